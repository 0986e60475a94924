"""PPO: advantages of tokens against a value head, and what that head learns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aem_lightning.collectives import over_ranks
from aem_lightning.functional import clipped_value_loss, token_gae, whiten
from aem_lightning.types import NonNegative, RolloutBatch


@dataclass(frozen=True)
class PPO:
    """Generalised advantages over tokens, whitened over the rollout batch of all ranks.

    With gamma = lam = 1 an advantage is the return of its trajectory from here on, minus the
    value. It needs a value head, which the agent adds to the policy. Source: arXiv 1707.06347;
    arXiv 1506.02438.

    Attributes:
        gamma: Discount a token.
        lam: Weight of the longer estimates.
        eps: Added to the standard deviation.
        value_clip: How far a value may move from the old one before its gradient stops.
        value_coef: Weight of the value loss.
        train_trunk: The value loss trains the adapters too, not the head alone. Values are in units
            of the return, so its gradient easily drowns the policy's.
    """

    gamma: float = 1.0
    lam: float = 1.0
    eps: NonNegative = 1e-6
    value_clip: float = 0.5
    value_coef: float = 0.5
    train_trunk: bool = False
    min_group_size: int = 1

    def __post_init__(self) -> None:
        checks = (
            ("gamma", self.gamma, 0 < self.gamma <= 1, "in (0, 1]"),
            ("lam", self.lam, 0 <= self.lam <= 1, "in [0, 1]"),
            ("value_clip", self.value_clip, self.value_clip > 0, "> 0"),
            ("value_coef", self.value_coef, self.value_coef > 0, "> 0"),
        )
        problems = [
            f"advantage.{n}={v}: type a number {want}" for n, v, ok, want in checks if not ok
        ]
        if problems:
            raise ValueError("; ".join(problems))

    def targets(self, batch: RolloutBatch) -> Tensor:
        """What the value head should say before each token, [S, L]."""
        values = _known(batch.values)
        _, returns = token_gae(
            batch.reward, values, batch.response_index, batch.trajectory, self.gamma, self.lam
        )
        return returns

    def __call__(self, batch: RolloutBatch) -> Tensor:
        inside = batch.response_index >= 0
        plain = (_known(batch.value_targets) - _known(batch.values))[inside]  # [T]
        everything, mine = over_ranks(plain)
        judged, _ = over_ranks(batch.judged[batch.trajectory][batch.response_index[inside]])
        advantages = torch.zeros_like(_known(batch.values))
        advantages[inside] = whiten(everything, eps=self.eps, mask=judged)[mine]
        return advantages

    def value_loss(self, values: Tensor, old_values: Tensor, targets: Tensor) -> Tensor:
        """The weighted loss of each value, [T]."""
        return self.value_coef * clipped_value_loss(
            values, old_values, targets, clip=self.value_clip
        )


def _known(column: Tensor | None) -> Tensor:
    if column is None:
        raise ValueError("PPO needs a batch with values and value_targets; the agent fills them in")
    return column
