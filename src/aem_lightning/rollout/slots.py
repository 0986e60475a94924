"""What the engine knows of its slots: whose they are, what they hold, what runs on them."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

from aem_lightning.rollout.constraint import Cursor
from aem_lightning.rollout.engine import Request, Result
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

    def result(self, reason: FinishReason, version: int) -> Result:
        """What has been drawn, as the engine's user gets it."""
        return Result(
            key=self.request.key,
            tokens=self.tokens,
            logprobs=self.logprobs,
            entropies=self.entropies,
            finish_reason=reason,
            version=version,
            reused=self.reused,
        )


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


def check_request(request: Request, busy: Container[str | None], max_length: int) -> None:
    """Raise ``ValueError`` for an empty prompt, one that does not fit, or a ``busy`` key."""
    prompt, new = len(request.prompt), request.sampling.max_new_tokens
    if request.key in busy:
        raise ValueError(f"{request.key}: submitted again before its last request has finished")
    if prompt == 0:
        raise ValueError(f"{request.key}: the prompt is empty; it needs at least 1 token")
    if prompt + new > max_length:
        raise ValueError(
            f"{request.key}: a prompt of {prompt} tokens and max_new_tokens={new} do not fit "
            f"into max_length={max_length}: set engine.max_length={prompt + new} or more, "
            "or shorten the prompt with memory=window or a smaller max_turns"
        )
