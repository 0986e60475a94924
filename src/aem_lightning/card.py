"""The card of a run: what was typed, on what it ran, how long it took and what came out.

Read from the files of the run's folder alone, so that a live run has one too; neither torch nor
any other room is loaded.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

ORIGIN = "run.json"  # what only the run itself can tell, written when it starts


@dataclass(frozen=True, slots=True)
class Success:
    """A success rate over evaluation episodes with its 95 % interval, all from 0 to 1."""

    rate: float
    low: float
    high: float
    episodes: int

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Success:
        """That of a result as ``summary.json`` has it."""
        return cls(*(result[name] for name in cls.__slots__))

    def __str__(self) -> str:
        interval = f"[{100 * self.low:.1f}, {100 * self.high:.1f}]"
        return f"{100 * self.rate:.1f} % {interval} of {self.episodes}"


@dataclass(frozen=True, slots=True)
class Cost:
    """A stage of the cost table: wall seconds over all iterations, and shares from 0 to 1.

    ``paper`` is the share that the paper gives for it, where it gives one.
    """

    label: str
    seconds: float
    share: float
    paper: float | None


@dataclass(frozen=True, slots=True)
class RunCard:
    """What a run was. What its folder does not tell is ``None`` or empty.

    Attributes:
        name: Of the run, else of its folder.
        finished: It wrote its results.
        command: What to type to run the same again.
        started: When it did, ISO 8601 with the offset to UTC; a resumed run's last start.
        commit: Of the checkout that it ran from; ``None`` for an installed package.
        dirty: Files of the checkout differed from the commit, or were not in it.
        versions: Of Python and the packages that count.
        games: A hash of each split's games, where the DataModule knows one.
        device: What it computed on.
        seed: Its seed.
        iterations: Done; known at the end.
        hours: Wall time since the last start, of all stages.
        success: ``before`` and ``after`` training, or of an ``evaluation``.
        costs: Where the seconds of an iteration go.
    """

    name: str
    finished: bool = False
    command: str | None = None
    started: str | None = None
    commit: str | None = None
    dirty: bool = False
    versions: Mapping[str, str] = field(default_factory=dict)
    games: Mapping[str, str] = field(default_factory=dict)
    device: str | None = None
    seed: int | None = None
    iterations: int | None = None
    hours: float | None = None
    success: Mapping[str, Success] = field(default_factory=dict)
    costs: tuple[Cost, ...] = ()

    def lines(self) -> dict[str, str]:
        """What is known beside the cost table, by name, in words."""
        dirty = ", with changes that are not committed" if self.dirty else ""
        hours = None if self.hours is None else f"{self.hours:.2g}"
        if hours is not None and not self.finished:
            hours += " so far, without results"
        found = {
            "command": self.command,
            "started": self.started,
            "hours": hours,
            "device": self.device,
            "commit": self.commit and self.commit + dirty,
            "versions": _listed(self.versions),
            "games": _listed(self.games),
            "seed": self.seed,
            "iterations": self.iterations,
            **{f"success {when}": str(success) for when, success in self.success.items()},
        }
        return {name: str(text) for name, text in found.items() if text not in (None, "")}

    def markdown(self) -> str:
        """The card as markdown: a table, the command as a block, the cost table."""
        lines = self.lines()
        command = lines.pop("command", None)
        parts = [] if command is None else [f"```sh\n{command}\n```"]
        if lines:
            rows = (f"| {name} | {_cell(text)} |" for name, text in lines.items())
            parts.append("\n".join(["| | |", "|---|---|", *rows]))
        if self.costs:
            rows = (f"| {' | '.join(map(_cell, row))} |" for row in cost_rows(self.costs))
            head = ["| stage | seconds | share | paper |", "|---|---:|---:|---:|"]
            parts.append("\n".join([*head, *rows]))
        return "\n\n".join(parts)


def run_card(folder: Path) -> RunCard:
    """The card of the run in ``folder``, finished or not.

    A file that is missing, or is another program's, tells nothing.
    """
    origin, summary, evaluation, times = (
        _read(folder / name)
        for name in (ORIGIN, "summary.json", "evaluation.json", "step_time.json")
    )
    try:
        return _card(folder, origin, summary, evaluation, times)
    except (AttributeError, KeyError, TypeError, ValueError):
        return RunCard(folder.absolute().name)


def _card(
    folder: Path,
    origin: Mapping[str, Any],
    summary: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    times: Mapping[str, Any],
) -> RunCard:
    results = {
        "before": summary.get("success_before") or _read(folder / "success_before.json"),
        "after": summary.get("success_after"),
        "evaluation": evaluation.get("success"),
    }
    seconds, started = summary.get("seconds"), origin.get("started")
    return RunCard(
        name=summary.get("name") or origin.get("name") or folder.absolute().name,
        finished=bool(summary or evaluation),
        command=origin.get("command") or _of_an_analysis(folder),
        started=started,
        commit=origin.get("commit"),
        dirty=bool(origin.get("dirty")),
        versions={**origin.get("versions", {})},
        games={**(origin.get("games") or evaluation.get("games") or {})},
        device=origin.get("device"),
        seed=summary.get("seed", evaluation.get("seed", origin.get("seed"))),
        iterations=summary.get("iterations", evaluation.get("iteration")),
        hours=sum(seconds.values()) / 3600 if seconds else _hours_since(started, folder),
        success={when: Success.of(found) for when, found in results.items() if found},
        costs=tuple(
            Cost(stage["label"], stage["seconds"], stage["share"], stage["paper_share"])
            for stage in times.get("stages", ())
        ),
    )


def cost_rows(costs: tuple[Cost, ...]) -> list[tuple[str, str, str, str]]:
    """The cost table in words: stage, seconds, share, the paper's share."""
    return [
        (
            cost.label,
            f"{cost.seconds:,.2f}",
            f"{100 * cost.share:.2f} %",
            "–" if cost.paper is None else f"{100 * cost.paper:.1f} %",
        )
        for cost in costs
    ]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _of_an_analysis(folder: Path) -> str | None:
    """What an analysis trained this run with."""
    try:
        words = json.loads((folder / "analysis_overrides.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return shlex.join(["python", "train.py", *words])


def _hours_since(started: str | None, folder: Path) -> float | None:
    """From the start to what was written last, of a run that has not told its own."""
    if started is None:
        return None
    last = max(path.stat().st_mtime for path in (folder, *folder.glob("*.*")) if path.exists())
    return max(0.0, last - datetime.fromisoformat(started).timestamp()) / 3600


def _listed(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
