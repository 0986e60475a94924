"""The rollout engine: prompts in, responses out, both as token ids.

An engine knows nothing of tasks, turns or text. It is stateless towards its caller: every request
carries its whole prompt, and whether earlier keys and values can be used again is the engine's own
business. So a window prompt and an append-only transcript go through one path, and engines can be
exchanged by a config option.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import nn

from aem_lightning.rollout.constraint import Constraint
from aem_lightning.types import FinishReason


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a response is drawn: plain softmax sampling, no top-k, no top-p, no penalties.

    Whatever reshapes the distribution would make the sampler's log-probabilities those of another
    policy.

    Attributes:
        temperature: Divides the logits. 0 takes the most likely token, with log-probabilities and
            entropies then at temperature 1.
        max_new_tokens: Longest response, its end token included.
        stop_ids: Tokens that end a response; the one that was drawn is part of it.

    Raises:
        ValueError: A temperature that is negative or not finite, or ``max_new_tokens`` under 1.
    """

    temperature: float = 1.0
    max_new_tokens: int = 64
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(
                f"temperature={self.temperature} is not allowed: a finite number >= 0, "
                "where 0 takes the most likely token"
            )
        if self.max_new_tokens < 1:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens}: a response has at least 1 token"
            )


@dataclass(frozen=True, slots=True)
class Request:
    """One response to be drawn.

    Attributes:
        key: The episode; stable over its turns, so that an engine can find what it computed for it
            before.
        prompt: The whole input, as token ids.
        sampling: How to draw.
        seed: Fixes the draw: the same policy, prompt, sampling and seed give the same response,
            whichever requests are in the same batch (up to the rounding of the logits).
        constraint: What the response may be, where that is limited. It decides what is drawn;
            log-probabilities and entropies stay those over the full vocabulary.
    """

    key: str
    prompt: Sequence[int]
    sampling: Sampling
    seed: int
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """One finished response.

    Attributes:
        key: The episode that asked for it.
        tokens: The sampled ids, the end token included.
        logprobs: Log-probability of each token at the sampling temperature, in nats.
        entropies: Entropy of each next-token distribution over the full vocabulary at the sampling
            temperature, in nats; ``None`` from engines that cannot see it.
        finish_reason: ``stop`` after an end token, ``length`` at ``max_new_tokens``.
        version: The policy version given to ``sync``.
        reused: Prompt tokens whose keys and values were not computed again.
    """

    key: str
    tokens: list[int]
    logprobs: list[float]
    entropies: list[float] | None
    finish_reason: FinishReason
    version: int
    reused: int


class SyncablePolicy(Protocol):
    """What an engine needs of a policy: the causal language model, adapters included."""

    @property
    def causal_lm(self) -> nn.Module: ...


@runtime_checkable
class RolloutEngine(Protocol):
    """Draws responses for many episodes at once."""

    def sync(self, policy: SyncablePolicy, version: int) -> None:
        """Take the policy's present weights; every cached key and value is dropped."""

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests; at most one unfinished request a key."""

    def poll(self, wait_all: bool = False, at_least: int = 1) -> list[Result]:
        """Run until ``at_least`` requests (all of them with ``wait_all``) have finished.

        Returns what has finished, which may be more; and less only when no more was submitted.
        """

    def close(self, key: str) -> None:
        """End an episode: its place is free, and an unfinished request of it is dropped."""
