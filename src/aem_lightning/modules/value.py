"""The value head on the policy's hidden states, and what its training adds to the loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from aem_lightning.algorithms import PPO, LossTerms
from aem_lightning.types import RolloutBatch


class ValueHead(nn.Module):
    """A linear function of last hidden states, in float32 whatever the policy computes in.

    It starts at 0: the first advantages are returns, and no random number is drawn.

    Args:
        hidden_size: Width of the hidden states.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Values [T] of hidden states [T, d]."""
        with torch.autocast(hidden.device.type, enabled=False):
            values: Tensor = self.linear(hidden.to(self.linear.weight.dtype))[:, 0]
        return values


def fill_values(
    critic: PPO, policy: nn.Module, batch: RolloutBatch, micro: Iterable[Sequence[int]]
) -> None:
    """Give the batch the values before the update, and what the head should have said.

    Args:
        critic: Says what values are worth.
        policy: A `Policy` with a value head.
        batch: Its ``values`` and ``value_targets`` are set.
        micro: Rows to score, in micro-batches.
    """
    batch.values = torch.zeros(batch.input_ids.shape, device=batch.input_ids.device)
    with torch.no_grad():
        for rows in micro:
            index = torch.tensor(rows, device=batch.input_ids.device)
            width = int(batch.row_length[index].max())
            mask = batch.response_index[index, :width] >= 0
            hidden = policy.hidden_states(batch.input_ids[index, :width], mask)  # type: ignore[operator]
            part = batch.values[index, :width]
            part[mask] = policy.value_head(hidden).to(part.dtype)  # type: ignore[operator]
            batch.values[index, :width] = part
    batch.value_targets = critic.targets(batch)


def with_value_loss(
    critic: PPO,
    terms: LossTerms,
    values: Tensor,
    old_values: Tensor | None,
    targets: Tensor | None,
    weights: Tensor,
) -> LossTerms:
    """The loss of T tokens with that of their values; ``weights`` are the aggregation's, [T].

    Raises:
        ValueError: The batch has no values: `fill_values` comes first.
    """
    if old_values is None or targets is None:
        raise ValueError("the batch has no values: fill_values comes before the update")
    losses = critic.value_loss(values, old_values, targets)
    stats = {
        "value_loss": losses.detach().sum(),
        "value": values.detach().sum(),
        "value_target": targets.sum(),
    }
    return LossTerms(terms.loss + (weights * losses).sum(), {**terms.stats, **stats})
