"""The loss of one micro-batch, a sum over tokens: the caller divides by the global unit count."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from aem_lightning.algorithms.entropy_control import AdaptiveEntropy, CovarianceControl
from aem_lightning.functional import (
    aggregation_weights,
    cispo_surrogate,
    clipped_surrogate,
    dppo_surrogate,
    importance_weights,
    kl_k3,
)
from aem_lightning.functional.losses import Aggregation, Divergence
from aem_lightning.functional.segments import segment_ids, segment_mean
from aem_lightning.types import Positive


@dataclass(frozen=True)
class LossTerms:
    """Sums over the response tokens of one micro-batch.

    Attributes:
        loss: What is differentiated, a scalar.
        stats: Detached sums for the log, keyed by metric name without its prefix.
        weights: How much each token counts in the sum, [T], for PPO's value loss; ``None`` is 1.
    """

    loss: Tensor
    stats: dict[str, Tensor]
    weights: Tensor | None = None


@dataclass(frozen=True)
class TokenColumns:
    """What a loss may ask of T response tokens beyond their scores.

    Attributes:
        responses: The response of each, [T]; a micro-batch holds whole responses.
        lengths: Tokens of that response, [T].
        sampler_logprobs: As the engine saw them, [T].
        chosen: Tokens that covariance control has chosen, [T] bool; ``None`` without it.
    """

    responses: Tensor
    lengths: Tensor
    sampler_logprobs: Tensor | None = None
    chosen: Tensor | None = None


class Loss(Protocol):
    """Anything that sums a loss over T response tokens of a micro-batch, also where T is 0.

    The agent divides the sum by the units of the whole minibatch, on all ranks.
    """

    @property
    def aggregation(self) -> Aggregation:
        """``token``, or ``sequence`` and ``constant``, which both stand for a response."""
        ...

    @property
    def needs_reference(self) -> bool:
        """Whether ``ref_logprobs`` are read; else they are None, and cost nothing."""
        ...

    @property
    def keeps_zeros(self) -> bool:
        """Whether a response of advantage 0 has no gradient, but for that of a KL term."""
        ...

    def __call__(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        ref_logprobs: Tensor | None,
        entropies: Tensor,
        advantages: Tensor,
        columns: TokenColumns,
    ) -> LossTerms:
        """The sums over the tokens; every argument is [T]."""
        ...


@dataclass(frozen=True)
class ImportanceCorrection:
    """Truncated importance sampling between the engine that sampled and the trainer.

    The loss of a token is multiplied by ``importance_weights``. Source: Yao et al., "Your efficient
    RL framework secretly brings you off-policy RL training", 2025.
    """

    level: Literal["token", "sequence"] = "token"
    mode: Literal["truncate", "mask"] = "truncate"
    limit: float = 2.0

    def __post_init__(self) -> None:
        empty = torch.zeros(0)
        try:
            self(empty, empty, empty.long())
        except ValueError as error:
            raise ValueError(f"loss.correction.{error}") from None

    def __call__(self, logprobs: Tensor, sampler_logprobs: Tensor, responses: Tensor) -> Tensor:
        """The weight of each token, [T]; ``logprobs`` are the trainer's before the update."""
        return importance_weights(
            logprobs,
            sampler_logprobs,
            responses,
            level=self.level,
            mode=self.mode,
            limit=self.limit,
        )


@dataclass(frozen=True)
class ClippedLoss:
    """Clipped surrogate with an optional KL term and entropy bonus.

    Per token: ``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)``, bounded by ``-dual_clip A``
    where A < 0, plus ``kl_coef * k3`` and minus ``entropy_coef * H``. Source: arXiv 1707.06347;
    dual clip arXiv 1912.09729. ``entropy_coef`` is 0 unless it is asked for: a hidden bonus would
    confound every entropy curve.

    Attributes:
        clip_low: Distance of the clip below 1.
        clip_high: Distance above 1; more than ``clip_low`` is DAPO's clip-higher.
        dual_clip: Bound on the ratio where A < 0.
        kl_coef: Weight of the KL term towards the reference.
        entropy_coef: Weight of the entropy bonus; where ``adaptive_entropy`` is set, its start.
        ratio: ``token``, or ``sequence`` for the length-normalised ratio of the response (GSPO,
            arXiv 2507.18071).
        aggregation: Mean over tokens (``token``), over responses of their mean (``sequence``), or
            over responses of their sum over a ``constant``; see `aggregation_weights`.
        constant: The divisor of ``aggregation=constant``.
        correction: Importance weights between sampler and trainer.
        covariance: Clip-Cov or KL-Cov.
        adaptive_entropy: Moves ``entropy_coef`` between iterations.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = 3.0
    kl_coef: float = 0.01
    entropy_coef: float = 0.0
    ratio: Literal["token", "sequence"] = "token"
    aggregation: Aggregation = "token"
    constant: int | None = None
    correction: ImportanceCorrection | None = None
    covariance: CovarianceControl | None = None
    adaptive_entropy: AdaptiveEntropy | None = None

    def __post_init__(self) -> None:
        bounded = self.dual_clip is None or self.dual_clip > 1
        divisible = self.aggregation != "constant" or (self.constant or 0) >= 1
        mean_of = ("token", "sequence", "constant")
        problems = [
            f"loss.{name}={value}: {want}"
            for name, value, ok, want in (
                ("clip_low", self.clip_low, *self.low_bound()),
                ("clip_high", self.clip_high, self.clip_high >= 0, "type a number >= 0"),
                ("dual_clip", self.dual_clip, bounded, "type a number > 1, or null"),
                ("kl_coef", self.kl_coef, self.kl_coef >= 0, "type a number >= 0"),
                ("ratio", self.ratio, self.ratio in mean_of[:2], "type token or sequence"),
                (
                    "aggregation",
                    self.aggregation,
                    self.aggregation in mean_of,
                    "type token, sequence or constant",
                ),
                ("constant", self.constant, divisible, "type a number >= 1, e.g. 512"),
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
        columns: TokenColumns | None = None,
    ) -> LossTerms:
        """The summed loss of T response tokens; every argument is [T]."""
        weights = self.weights(logprobs, columns)
        surrogate, clipped = self.surrogate(logprobs, old_logprobs, advantages, columns)
        log_ratio = (logprobs - old_logprobs).detach()
        stats = {
            "surrogate": surrogate.detach().sum(),
            "approx_kl": (torch.expm1(log_ratio) - log_ratio).sum(),
            "clip_fraction": clipped.float().sum(),
            "entropy": entropies.detach().sum(),
        }
        if columns is not None and columns.sampler_logprobs is not None:
            gap = (old_logprobs - columns.sampler_logprobs).detach()
            stats["sampler_gap"] = gap.abs().sum()
            stats["sampler_kl"] = (torch.expm1(gap.clamp(max=20.0)) - gap).sum()
            if self.correction is not None:
                correction = self.correction(
                    old_logprobs, columns.sampler_logprobs, columns.responses
                )
                surrogate = surrogate * correction
                stats["correction"] = correction.sum()
        if self.covariance is not None and columns is not None and columns.chosen is not None:
            surrogate = self.covariance.treat(surrogate, logprobs, old_logprobs, columns.chosen)
            stats["covariance_tokens"] = columns.chosen.float().sum()
        loss = (weights * surrogate).sum()
        if self.kl_coef and ref_logprobs is not None:
            kl = kl_k3(logprobs, ref_logprobs)
            loss = loss + self.kl_coef * (weights * kl).sum()
            stats["ref_kl"] = kl.detach().sum()
        if self.entropy_coef:
            loss = loss - self.entropy_coef * (weights * entropies).sum()
        return LossTerms(loss, stats, weights)

    def low_bound(self) -> tuple[bool, str]:
        """Whether ``clip_low`` is allowed, and what is."""
        return 0 <= self.clip_low < 1, "type a number in [0, 1)"

    @property
    def needs_reference(self) -> bool:
        """Whether there is a KL term."""
        return bool(self.kl_coef)

    @property
    def keeps_zeros(self) -> bool:
        """Whether there is no bonus for entropy, and none may come to be."""
        return not self.entropy_coef and self.adaptive_entropy is None

    def adapted(self, coef: float, entropy: float) -> tuple[ClippedLoss, float]:
        """The loss for an iteration of this mean token entropy, and the coefficient of the next.

        Without ``adaptive_entropy`` both stay as they are. ``coef`` is the state, which the agent
        keeps and saves: ``entropy_coef`` is 0 while the entropy is over its target.
        """
        rule = self.adaptive_entropy
        if rule is None:
            return self, coef
        return replace(self, entropy_coef=rule.active(coef, entropy)), rule.after(coef, entropy)

    def weights(self, logprobs: Tensor, columns: TokenColumns | None) -> Tensor:
        """How much each token counts in the sum, [T]."""
        if self.aggregation == "token":
            return torch.ones_like(logprobs.detach())
        return aggregation_weights(
            _given(columns).lengths,
            self.aggregation,
            constant=self.constant,
            dtype=logprobs.dtype,
        )

    def surrogate(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        columns: TokenColumns | None,
    ) -> tuple[Tensor, Tensor]:
        """The clipped loss of each token, [T], and which are clipped; GSPO's is its response's."""
        given, ids = [logprobs, old_logprobs, advantages], None
        if self.ratio == "sequence":
            ids, count = segment_ids(_given(columns).responses)
            given = [segment_mean(values, ids, count) for values in given]  # [responses]
        surrogate, clipped = clipped_surrogate(
            *given, clip_low=self.clip_low, clip_high=self.clip_high, dual_clip=self.dual_clip
        )
        return (surrogate, clipped) if ids is None else (surrogate[ids], clipped[ids])


def _need_token_ratios(loss: ClippedLoss, reason: str) -> None:
    if loss.ratio != "token" or loss.dual_clip is not None:
        raise ValueError(
            f"loss.ratio={loss.ratio} loss.dual_clip={loss.dual_clip}: {reason}; type "
            "loss.ratio=token loss.dual_clip=null"
        )


@dataclass(frozen=True)
class CISPO(ClippedLoss):
    """`ClippedLoss` with clipped importance weights in place of a clipped ratio.

    No token loses its gradient: see `cispo_surrogate`. Without a lower clip (``clip_low=1``) and
    with an upper one of 5 by public advice. Source: arXiv 2506.13585.
    """

    clip_low: float = 1.0
    clip_high: float = 5.0
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _need_token_ratios(self, "CISPO weighs tokens, and bounds nothing else")

    def low_bound(self) -> tuple[bool, str]:
        return 0 <= self.clip_low <= 1, "type a number in [0, 1]"

    def surrogate(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        columns: TokenColumns | None,
    ) -> tuple[Tensor, Tensor]:
        clips = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        return cispo_surrogate(logprobs, old_logprobs, advantages, **clips)


@dataclass(frozen=True)
class DPPO(ClippedLoss):
    """`ClippedLoss` with a trust region of probabilities in place of clipped ratios.

    A token that has left it in the direction of its advantage has no gradient: see
    `dppo_surrogate`. The region lies around the sampler's probabilities, so it sees both what the
    update and what the engine has moved. The clips are not used. Source: arXiv 2602.04879.

    Attributes:
        delta: The region's size.
        divergence: ``tv``, of the sampled token's probability, or ``kl``, of it against all others.
    """

    dual_clip: float | None = None
    delta: Positive = 0.2
    divergence: Divergence = "tv"

    def __post_init__(self) -> None:
        super().__post_init__()
        _need_token_ratios(self, "DPPO masks tokens and clips no ratio")
        if not self.delta > 0 or self.divergence not in get_args(Divergence):
            raise ValueError(
                f"loss.delta={self.delta}, loss.divergence={self.divergence}: type a number > 0, "
                f"and one of {', '.join(get_args(Divergence))}"
            )

    def surrogate(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        columns: TokenColumns | None,
    ) -> tuple[Tensor, Tensor]:
        sampler = _given(columns).sampler_logprobs
        return dppo_surrogate(
            logprobs,
            old_logprobs,
            advantages,
            old_logprobs if sampler is None else sampler,
            delta=self.delta,
            divergence=self.divergence,
        )


def _given(columns: TokenColumns | None) -> TokenColumns:
    if columns is None:
        raise ValueError(
            "ratio=sequence, DPPO and the aggregations sequence and constant need columns: which "
            "response each token is in, how long that is, and what the sampler saw"
        )
    return columns
