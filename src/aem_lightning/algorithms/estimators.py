"""Base estimators: from a rollout batch to one advantage a response."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from aem_lightning.functional import grpo_advantages
from aem_lightning.types import RolloutBatch


class Estimator(Protocol):
    """Anything that gives base advantages, [R], and names the smallest group it can compare."""

    min_group_size: int

    def __call__(self, batch: RolloutBatch) -> Tensor: ...


@dataclass(frozen=True)
class GRPO:
    """Group-relative advantages: (return - group mean) / (group std + eps), for every response.

    Statistics are over trajectories, so a long failed episode counts no more than a short one.
    Source: arXiv 2402.03300, equation 3.
    """

    normalize_std: bool = True
    eps: float = 1e-6
    min_group_size: int = 2

    def __call__(self, batch: RolloutBatch) -> Tensor:
        advantages = grpo_advantages(
            batch.returns,
            batch.group,
            normalize_std=self.normalize_std,
            eps=self.eps,
            mask=batch.loss_mask,
        )  # [N]
        return advantages[batch.trajectory]
