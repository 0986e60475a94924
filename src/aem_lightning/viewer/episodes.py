"""The records of a transcripts file: read, counted through, and chosen from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]
NAME = "transcripts.jsonl"
OUTCOMES = ("won", "lost", "broken")
_NEEDED = ("task", "task_type", "split", "won", "returns", "truncated", "infra_error", "turns")


@dataclass(frozen=True, slots=True)
class Wish:
    """Which episodes to show; ``None`` wishes for nothing.

    Attributes:
        outcome: ``won``, ``lost``, or ``broken`` by the environment.
        task_type: Part of the task type.
        stage: ``train``, ``validate``, ``test`` or ``evaluate``.
        iteration: The training iteration.
    """

    outcome: str | None = None
    task_type: str | None = None
    stage: str | None = None
    iteration: int | None = None

    def fits(self, record: Record) -> bool:
        """The episode is wished for."""
        return (
            (self.outcome is None or self.outcome == outcome_of(record))
            and (self.task_type is None or self.task_type in record["task_type"])
            and (self.stage is None or self.stage == record.get("stage"))
            and (self.iteration is None or self.iteration == record.get("iteration"))
        )


def read_episodes(path: Path) -> list[Record]:
    """The episodes of a transcripts file, or of the one in a run's folder.

    A half last line, which a killed run leaves, is passed over.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is no episode, or there is none.
    """
    file = path / NAME if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: there is no such file. Training writes logs/<name>/<time>/{NAME}, an "
            f"evaluation logs/eval/<time>/{NAME}, policy=api logs/api/{NAME}"
        )
    text = file.read_text(encoding="utf-8")
    lines = text.split("\n")  # an observation may hold other line ends
    records = [
        _record(line, f"{file}:{number}") for number, line in enumerate(lines[:-1], 1) if line
    ]
    if not records:
        raise ValueError(f"{file}: no episode is in it yet")
    return records


@dataclass(frozen=True, slots=True)
class Part:
    """What was written to a transcripts file behind a place in it.

    Attributes:
        episodes: By their numbers in the file, from 1.
        number: Episodes up to its end.
        offset: The byte behind it, where the next part begins.
        more: There is more in the file already.
        reset: The file is another one, shorter than the place: this part is of its beginning.
        unreadable: Lines that are no episodes.
    """

    episodes: Mapping[int, Record] = field(default_factory=dict)
    number: int = 0
    offset: int = 0
    more: bool = False
    reset: bool = False
    unreadable: int = 0


def read_part(file: Path, offset: int, number: int, limit: int = 1 << 22) -> Part:
    """The whole lines behind ``offset``, in about ``limit`` bytes, of a file that a run appends to.

    ``number`` is that of the last episode before. A line that is being written is left for later;
    a file that is not there yet has no lines.
    """
    size = file.stat().st_size if file.is_file() else 0
    if reset := size < offset:
        offset = number = 0
    if size == offset:
        return Part({}, number, offset, reset=reset)
    with file.open("rb") as source:
        source.seek(offset)
        text = source.read(limit)
        text += b"" if text.endswith(b"\n") else source.readline()
    text = text[: text.rfind(b"\n") + 1]
    end = offset + len(text)
    found: dict[int, Record] = {}
    unreadable = 0
    for line in filter(None, text.split(b"\n")):
        try:
            found[number + 1] = _record(line.decode(errors="replace"), str(file))
            number += 1
        except ValueError:
            unreadable += 1
    return Part(found, number, end, bool(text) and end < size, reset, unreadable)


def chosen(records: Sequence[Record], wish: Wish) -> dict[int, Record]:
    """The episodes that are wished for, by their number in the file, from 1.

    Raises:
        ValueError: There is none; the message says what there is.
    """
    found = {n: record for n, record in enumerate(records, 1) if wish.fits(record)}
    if not found:
        there = {
            "outcome": {outcome_of(record) for record in records},
            "type": {record["task_type"] for record in records},
            "stage": {record.get("stage") for record in records},
            "iteration": {record.get("iteration") for record in records},
        }
        listed = "\n".join(
            f"  --{name}: {', '.join(map(str, sorted(values, key=lambda v: (str(type(v)), v))))}"
            for name, values in there.items()
        )
        raise ValueError(f"None of {len(records)} episodes is wanted. There are:\n{listed}")
    return found


def outcome_of(record: Record) -> str:
    """One of `OUTCOMES`."""
    if record["infra_error"]:
        return "broken"
    return "won" if record["won"] else "lost"


def groups(episodes: Mapping[int, Record]) -> list[dict[int, Record]]:
    """The copies that were played of one task side by side, by their numbers.

    A copy that comes again, as a resumed run plays it, begins a group of its own.
    """
    found: dict[tuple[Any, ...], list[dict[int, Record]]] = {}
    for number, record in episodes.items():
        of_batch = record.get("group") if record.get("stage") == "train" else None
        names = ("stage", "iteration", "rank", "model", "task")
        played = found.setdefault((*map(record.get, names), of_batch), [{}])
        if record.get("copy") in {other.get("copy") for other in played[-1].values()}:
            played.append({})
        played[-1][number] = record
    return [group for played in found.values() for group in played]


def deed(turn: Record) -> tuple[Any, ...]:
    """What was seen and done in a turn; of a malformed response its words."""
    done = turn["action"]
    return (turn["observation"], turn["response"] if done is None else done)


def words(turn: Record) -> tuple[Any, ...]:
    """What was seen and written in a turn."""
    return (turn["observation"], turn["response"])


def parting(copies: Iterable[Record], of: Callable[[Record], tuple[Any, ...]] = deed) -> int | None:
    """The first turn at which copies differ, or one of them has ended; ``None`` for none."""
    rows = zip_longest(*(map(of, copy["turns"]) for copy in copies))
    return next((i for i, row in enumerate(rows) if any(each != row[0] for each in row)), None)


def mean(turns: Iterable[Record], name: str) -> float | None:
    """The mean of a number over the turns that have it."""
    values = [turn[name] for turn in turns if turn.get(name) is not None]
    return sum(values) / len(values) if values else None


def verdict(turn: Record) -> str:
    """What became of a turn's action: ``accepted``, ``not admissible`` or ``malformed``."""
    if turn["action"] is None:
        return "malformed"
    return "accepted" if turn["valid"] else "not admissible"


def prompts(record: Record) -> list[Record | None]:
    """The prompt of each turn, whole: its ``text`` and ``ids``, or its ``messages``.

    A file keeps each as what it has beside the one before it. ``None`` where it was not kept.
    """
    whole: dict[str, Any] = {"text": "", "ids": [], "messages": []}
    found: list[Record | None] = []
    for turn in record["turns"]:
        kept = turn.get("prompt") or {}
        for name, by in kept.items():
            before = whole[name]
            whole[name] = before[: by["head"]] + by["new"] + before[len(before) - by["tail"] :]
        found.append({name: whole[name] for name in kept} or None)
    return found


def _record(line: str, place: str) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        record = None
    if not isinstance(record, dict) or any(name not in record for name in _NEEDED):
        raise ValueError(
            f"{place}: no episode: each line is a JSON object with {', '.join(_NEEDED)}"
        )
    return record
