"""The prompts of an episode, each kept as what it has beside the prompt before it.

Prompts of one episode are alike: under ``memory=transcript`` one begins with the whole of the one
before, under ``memory=window`` they share the words around the last turns. So a prompt is a change
of the former one, ``{"head": n, "new": ..., "tail": m}``: its first n and last m entries are those
of the former, which is empty at first. It is a change of text and of token ids, or, where a model
is talked to in messages, of those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from aem_lightning.types import Trajectory

Read = Callable[[Sequence[int]], str]
"""Token ids as the model reads them, special tokens included."""

# Characters of an episode's prompts that are kept, ids included; later prompts are left out.
MOST_CHARACTERS = 400_000
_OF_AN_ID = 6  # characters, with its comma


def kept_prompts(trajectory: Trajectory, read: Read | None) -> Iterator[dict[str, Any] | None]:
    """What to keep of the prompt of each turn: changes of ``text``, ``ids`` or ``messages``.

    ``None`` where there is nothing to keep: ids that nobody can read, or an episode whose prompts
    have more than `MOST_CHARACTERS`.
    """
    before: dict[str, Any] = {}
    room = MOST_CHARACTERS
    for turn in trajectory.turns:
        now: dict[str, Any] = {}
        if turn.messages is not None:
            now["messages"] = [dict(message) for message in turn.messages]
        elif read is not None and trajectory.rows:
            ids = trajectory.rows[turn.row][: turn.start]
            now = {"text": read(ids), "ids": ids}
        changes = {name: change(before.get(name, ()), value) for name, value in now.items()}
        room -= sum(_characters(name, each["new"]) for name, each in changes.items())
        yield changes if changes and room >= 0 else None
        before = now


def change(before: Sequence[Any], now: Any) -> dict[str, Any]:
    """``now`` by what it has beside ``before``.

    Example:
        >>> change([1, 2, 3, 9], [1, 2, 4, 5, 9])
        {'head': 2, 'new': [4, 5], 'tail': 1}
        >>> change("", "hello")
        {'head': 0, 'new': 'hello', 'tail': 0}
    """
    most = min(len(before), len(now))
    head = next((i for i in range(most) if before[i] != now[i]), most)
    tail = next((i for i in range(most - head) if before[-1 - i] != now[-1 - i]), most - head)
    return {"head": head, "new": now[head : len(now) - tail], "tail": tail}


def changed(before: Any, by: Mapping[str, Any]) -> Any:
    """What `change` was made of.

    Example:
        >>> changed([1, 2, 3, 9], {"head": 2, "new": [4, 5], "tail": 1})
        [1, 2, 4, 5, 9]
    """
    return before[: by["head"]] + by["new"] + before[len(before) - by["tail"] :]


def recorded_messages(turns: Iterable[Mapping[str, Any]]) -> Iterator[list[dict[str, str]] | None]:
    """The messages of each recorded turn, where they were kept."""
    before: list[dict[str, str]] = []
    for turn in turns:
        by = (turn.get("prompt") or {}).get("messages")
        yield None if by is None else (before := changed(before, by))


def _characters(name: str, new: Sequence[Any]) -> int:
    if name == "messages":
        return sum(len(message["content"]) for message in new)
    return len(new) * (_OF_AN_ID if name == "ids" else 1)
