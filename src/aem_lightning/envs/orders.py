"""What a pool and its workers say to each other, over a socket and pickled."""

from __future__ import annotations

from dataclasses import dataclass

from aem_lightning.types import EnvStep, ResetRequest


@dataclass(frozen=True, slots=True)
class Order:
    """What a worker is to do with one env slot: start an episode or not, then send these actions.

    A reset has a request and no action, a step one action and no request, a replay both.
    """

    slot: int
    request: ResetRequest | None
    actions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Broken:
    """An order that raised.

    Attributes:
        summary: The traceback's last line.
        traceback: All of it.
        fatal: No episode can do better: the environment cannot be made, or a package is missing.
        error: The exception itself, pickled, where it can be.
    """

    summary: str
    traceback: str
    fatal: bool = False
    error: bytes | None = None


@dataclass(frozen=True, slots=True)
class Beat:
    """A busy worker's sign of life."""


@dataclass(frozen=True, slots=True)
class Starting:
    """Sign of life of a worker that imports and makes its first environment.

    Attributes:
        computed_s: Processor seconds it has used.
    """

    computed_s: float


@dataclass(frozen=True, slots=True)
class Census:
    """The question for a worker's counters; answered by a dictionary of numbers, summed by name."""


Outcome = list[EnvStep] | Broken
"""One `EnvStep` for the reset, where there was one, and one for every action; or what broke."""
