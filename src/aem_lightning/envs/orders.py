"""What a pool and its workers say to each other, over a socket.

Orders come pickled: a worker trusts its pool. Answers are JSON, one a line, and no other than those
below: a pool runs nothing that an environment, or a worker that has gone astray, has written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aem_lightning.envs.answers import STEP, checked_answer
from aem_lightning.types import EnvStep, ResetRequest

_encode = json.JSONEncoder(separators=(",", ":")).encode
CLOSE_S = 5.0  # for a worker that is not at an order, to close its environments and end
OUTCOME_BYTES = 64 << 20  # a larger outcome is refused, and a longer line no answer at all


@dataclass(frozen=True, slots=True)
class Order:
    """What a worker is to do with one env slot: start an episode or not, then send these actions.

    A reset has a request and no action, a step one action and no request, a replay both.
    """

    slot: int
    request: ResetRequest | None
    actions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Census:
    """The question for a worker's counters, summed by name."""


@dataclass(frozen=True, slots=True)
class Played:
    """An order that was done.

    Attributes:
        number: Which order of this worker it was, counted from 1.
        steps: The last two answers of the environment, or the only one.
    """

    number: int
    steps: list[EnvStep]


@dataclass(frozen=True, slots=True)
class Refused:
    """An order whose environment returned what its contract does not allow: task, turn, value."""

    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class Broken:
    """An order that raised, or with number 0 a worker that could not start.

    Attributes:
        number: Which order it was.
        summary: The traceback's last line.
        traceback: All of it.
        fatal: No episode can do better: the environment cannot be made, or a package is missing.
        error: The name of the exception's class and its arguments, where these are plain.
    """

    number: int
    summary: str
    traceback: str
    fatal: bool = False
    error: tuple[str, Sequence[Any]] | None = None


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker has made its first environment."""


@dataclass(frozen=True, slots=True)
class Starting:
    """Sign of life of a worker that imports and makes its first environment.

    Attributes:
        computed_s: Processor seconds it has used.
    """

    computed_s: float


@dataclass(frozen=True, slots=True)
class Beat:
    """A busy worker's sign of life.

    Attributes:
        calls: Calls of environments that have returned so far.
    """

    calls: int


@dataclass(frozen=True, slots=True)
class Counted:
    """The answer to a `Census`."""

    counts: dict[str, float]


Outcome = Played | Refused | Broken
Answer = Outcome | Ready | Starting | Beat | Counted


def write_answer(kind: type[Answer], *values: Any) -> bytes:
    """A line that `read_answer` reads.

    Raises:
        TypeError, ValueError, RecursionError: JSON cannot say a value.
    """
    return _encode([kind.__name__, *values]).encode() + b"\n"


def write_played(number: int, steps: Sequence[EnvStep], task_id: str) -> bytes:
    """A line of `Played`, or of `Refused` where it would be too long.

    Keys of ``info`` that JSON cannot say are left out.
    """
    rows = [[s.observation, s.reward, s.terminated, s.truncated, s.info] for s in steps]
    try:
        line = write_answer(Played, number, rows)
    except (TypeError, ValueError, RecursionError):
        for row, step in zip(rows, steps, strict=True):
            row[4] = {key: value for key, value in step.info.items() if _can_say({key: value})}
        line = write_answer(Played, number, rows)
    if len(line) <= OUTCOME_BYTES:
        return line
    reason = f"task {task_id!r}: an answer of {len(line):,} bytes; allowed are {OUTCOME_BYTES:,}"
    return write_answer(Refused, number, reason)


def _can_say(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def read_answer(line: bytes) -> Answer:
    """What a worker said.

    Raises:
        ValueError: Anything that is not an answer, in form or in type.
    """
    try:
        word, *values = json.loads(line.decode())
        return _READERS[word](*values)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{line[:200]!r}") from error


def _played(number: Any, rows: Any) -> Played:
    steps = [checked_answer(row, STEP) for row in _is(list, rows)]
    if not 1 <= len(steps) <= 2:
        raise ValueError(rows)
    return Played(_is(int, number), steps)


def _broken(number: Any, summary: Any, traceback: Any, fatal: Any, error: Any) -> Broken:
    known = None
    if error is not None:
        name, arguments = error
        plain = [_is((str, int, float, type(None)), argument) for argument in arguments]
        known = _is(str, name), plain
    return Broken(_is(int, number), _is(str, summary), _is(str, traceback), _is(bool, fatal), known)


def _counted(counts: Any) -> Counted:
    return Counted({name: _is((int, float), n) for name, n in _is(dict, counts).items()})


def _is(kind: type | tuple[type, ...], value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(value)
    return value


_READERS: dict[str, Callable[..., Answer]] = {
    "Played": _played,
    "Refused": lambda number, reason: Refused(_is(int, number), _is(str, reason)),
    "Broken": _broken,
    "Ready": Ready,
    "Starting": lambda seconds: Starting(_is((int, float), seconds)),
    "Beat": lambda calls: Beat(_is(int, calls)),
    "Counted": _counted,
}
