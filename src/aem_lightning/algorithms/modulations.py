"""Modulations: a coefficient a response that rescales its base advantage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from aem_lightning.functional import aem_coefficients
from aem_lightning.types import RolloutBatch


@dataclass(frozen=True)
class Modulated:
    """Coefficients ``alpha`` [R], and the share of groups that the gate left at 1."""

    alpha: Tensor
    gated: float


class Modulation(Protocol):
    """Anything that gives a coefficient for each response of a batch."""

    def __call__(self, batch: RolloutBatch) -> Modulated: ...


@dataclass(frozen=True)
class NoModulation:
    """The base estimator as it is: every coefficient is 1."""

    def __call__(self, batch: RolloutBatch) -> Modulated:
        return Modulated(torch.ones_like(batch.entropy), 1.0)


@dataclass(frozen=True)
class AEM:
    """Adaptive Entropy Modulation: alpha = exp(-sharpness * H~) over its group mean.

    H~ is the response's mean token entropy, min-max normalised within its group; the mean is over
    unique responses. A group whose range is under ``min_range`` nats is left alone. Source: arXiv
    2605.00425.
    """

    sharpness: float = 1.0
    min_range: float = 0.1
    direction: Literal["paper", "reversed"] = "paper"

    def __post_init__(self) -> None:
        if not self.min_range >= 0:
            raise ValueError(
                f"modulation.min_range={self.min_range} is not a number of nats >= 0, e.g. 0.1."
            )
        if not math.isfinite(self.sharpness):
            raise ValueError(
                f"modulation.sharpness={self.sharpness} is not a finite number; the paper's is 1."
            )
        if self.direction not in ("paper", "reversed"):
            raise ValueError(
                f"modulation.direction={self.direction!r} is unknown; allowed: paper, reversed."
            )

    def __call__(self, batch: RolloutBatch) -> Modulated:
        mask = batch.response_mask & (batch.length > 0)
        group = batch.response_group
        alpha = aem_coefficients(
            batch.entropy,
            group,
            sharpness=self.sharpness,
            min_range=self.min_range,
            direction=self.direction,
            mask=mask,
        )
        return Modulated(alpha, _gated_share(batch.entropy[mask], group[mask], self.min_range))


def _gated_share(entropy: Tensor, group: Tensor, min_range: float) -> float:
    """Share of the groups whose entropy range is under the gate."""
    if not len(group):
        return 1.0
    _, index = group.unique(return_inverse=True)
    count = int(index.max()) + 1
    high = entropy.new_zeros(count).scatter_reduce(0, index, entropy, "amax", include_self=False)
    low = entropy.new_zeros(count).scatter_reduce(0, index, entropy, "amin", include_self=False)
    return float((high - low < min_range).float().mean())
