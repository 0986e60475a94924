"""The loss of one micro-batch, a sum over tokens: the caller divides by the global token count."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aem_lightning.functional import clipped_surrogate, kl_k3


@dataclass(frozen=True)
class LossTerms:
    """Sums over the response tokens of one micro-batch.

    Attributes:
        loss: What is differentiated, a scalar.
        stats: Detached sums for the log, keyed by metric name without its prefix.
    """

    loss: Tensor
    stats: dict[str, Tensor]


@dataclass(frozen=True)
class ClippedLoss:
    """Clipped surrogate with an optional KL term and entropy bonus.

    Per token: ``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)``, bounded by ``-dual_clip A``
    where A < 0, plus ``kl_coef * k3`` and minus ``entropy_coef * H``. Source: arXiv 1707.06347;
    dual clip arXiv 1912.09729. ``entropy_coef`` is 0 unless it is asked for: a hidden bonus would
    confound every entropy curve.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = 3.0
    kl_coef: float = 0.01
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        bounded = self.dual_clip is None or self.dual_clip > 1
        problems = [
            f"loss.{name}={value}: {want}"
            for name, value, ok, want in (
                ("clip_low", self.clip_low, 0 <= self.clip_low < 1, "type a number in [0, 1)"),
                ("clip_high", self.clip_high, self.clip_high >= 0, "type a number >= 0"),
                ("dual_clip", self.dual_clip, bounded, "type a number > 1, or null"),
                ("kl_coef", self.kl_coef, self.kl_coef >= 0, "type a number >= 0"),
            )
            if not ok
        ]
        if problems:
            raise ValueError("; ".join(problems))

    def __call__(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        ref_logprobs: Tensor | None,
        entropies: Tensor,
        advantages: Tensor,
    ) -> LossTerms:
        """The summed loss of T response tokens; every argument is [T]."""
        surrogate, clipped = clipped_surrogate(
            logprobs,
            old_logprobs,
            advantages,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
        )
        loss = surrogate.sum()
        log_ratio = (logprobs - old_logprobs).detach()
        stats = {
            "surrogate": surrogate.detach().sum(),
            "approx_kl": (torch.expm1(log_ratio) - log_ratio).sum(),
            "clip_fraction": clipped.float().sum(),
            "entropy": entropies.detach().sum(),
        }
        if self.kl_coef and ref_logprobs is not None:
            kl = kl_k3(logprobs, ref_logprobs).sum()
            loss = loss + self.kl_coef * kl
            stats["ref_kl"] = kl.detach()
        if self.entropy_coef:
            loss = loss - self.entropy_coef * entropies.sum()
        return LossTerms(loss, stats)
