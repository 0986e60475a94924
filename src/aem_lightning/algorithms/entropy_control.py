"""Entropy baselines to compare AEM with: a coefficient that holds a target, Clip-Cov and KL-Cov."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aem_lightning.functional import (
    clip_cov_tokens,
    kl_cov_tokens,
    token_covariances,
)
from aem_lightning.types import NonNegative, Share


@dataclass(frozen=True)
class AdaptiveEntropy:
    """An entropy coefficient that moves by ``step`` an iteration to hold ``target`` nats a token.

    The bonus is on while the measured entropy is at most the target. The coefficient is the only
    state; it is part of the checkpoint. ``c' = clip(c + step, 0, maximum)`` while the entropy is
    under the target, ``c - step`` while it is over. Source: arXiv 2505.22312, section 4.
    """

    target: float
    step: float = 0.005
    maximum: float = 0.1

    def __post_init__(self) -> None:
        checks = (
            ("target", self.target, self.target > 0, "a number of nats > 0"),
            ("step", self.step, self.step > 0, "a number > 0"),
            ("maximum", self.maximum, self.maximum > 0, "a number > 0"),
        )
        problems = [f"loss.adaptive_entropy.{n}={v}: type {w}" for n, v, ok, w in checks if not ok]
        if problems:
            raise ValueError("; ".join(problems))

    def active(self, coef: float, entropy: float) -> float:
        """The coefficient that an iteration of this entropy is trained with."""
        return coef if entropy <= self.target else 0.0

    def after(self, coef: float, entropy: float) -> float:
        """The coefficient for the next iteration."""
        moved = coef + self.step if entropy < self.target else coef - self.step
        return min(max(moved, 0.0), self.maximum)


@dataclass(frozen=True)
class ClipCov:
    """Clip-Cov: a few random tokens of high covariance leave the policy gradient.

    Covariances are those of the policy that sampled, over the rollout batch of all ranks: how it is
    cut does not matter. Source: arXiv 2505.22617, section 4.2.
    """

    ratio: Share = 2e-4
    low: float = 1.0
    high: float = 5.0

    def select(
        self, logprobs: Tensor, advantages: Tensor, mask: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The chosen ones of T tokens, [T] bool; all arguments [T] too."""
        covariances = token_covariances(logprobs, advantages, mask=mask)
        return clip_cov_tokens(
            covariances, ratio=self.ratio, low=self.low, high=self.high, generator=generator
        )

    def treat(
        self, surrogate: Tensor, logprobs: Tensor, old_logprobs: Tensor, chosen: Tensor
    ) -> Tensor:
        """The surrogate of T tokens after what happens to the ``chosen`` ones, [T]."""
        return torch.where(chosen, torch.zeros_like(surrogate), surrogate)


@dataclass(frozen=True)
class KLCov:
    """KL-Cov: the tokens of the highest covariance pay for their distance to the old policy.

    The payment is ``coef * |log p - log p_old|``, so it starts with the second optimizer step.
    Covariances are as for `ClipCov`. Source: arXiv 2505.22617, section 4.2.
    """

    ratio: Share = 2e-3
    coef: NonNegative = 1.0

    def select(
        self, logprobs: Tensor, advantages: Tensor, mask: Tensor, generator: torch.Generator
    ) -> Tensor:
        return kl_cov_tokens(token_covariances(logprobs, advantages, mask=mask), ratio=self.ratio)

    def treat(
        self, surrogate: Tensor, logprobs: Tensor, old_logprobs: Tensor, chosen: Tensor
    ) -> Tensor:
        distance = self.coef * (logprobs - old_logprobs).abs()
        return surrogate + torch.where(chosen, distance, torch.zeros_like(distance))


CovarianceControl = ClipCov | KLCov
"""Chooses tokens once a rollout batch, and treats their loss in its own way."""
