"""What the ``hf`` engine knows of its slots: whose they are, what they hold, what runs on them."""

from __future__ import annotations

from dataclasses import dataclass, field

from aem_lightning.rollout.constraint import Cursor
from aem_lightning.rollout.engine import Request
from aem_lightning.types import FinishReason


@dataclass(slots=True)
class Job:
    """A request being worked on, with what has been drawn for it."""

    request: Request
    order: int
    uniforms: list[float]
    reused: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    cursor: Cursor | None = field(init=False)

    def __post_init__(self) -> None:
        constraint = self.request.constraint
        self.cursor = None if constraint is None else constraint.begin()

    def take(self, token: int, logprob: float, entropy: float) -> None:
        """Go on by a token that was drawn."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.entropies.append(entropy)
        if self.cursor is not None:
            self.cursor.take(token)

    def finish_reason(self) -> FinishReason | None:
        sampling = self.request.sampling
        if self.tokens[-1] in sampling.stop_ids:
            return "stop"
        return "length" if len(self.tokens) >= sampling.max_new_tokens else None


@dataclass(slots=True)
class Slot:
    """A cache row: whose it is, which tokens it holds, what runs on it, when it last ran."""

    key: str | None = None
    is_new: bool = False  # its episode has not run here yet
    ids: list[int] = field(default_factory=list)
    job: Job | None = None
    used: int = -1


def common_prefix(left: list[int], right: list[int]) -> int:
    """Length of the longest common prefix."""
    limit = min(len(left), len(right))
    if left[:limit] == right[:limit]:
        return limit
    return next(i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
