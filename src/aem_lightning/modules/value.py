"""The value head on the policy's hidden states, and what its training adds to the loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aem_lightning.algorithms import PPO, LossTerms


class ValueHead(nn.Module):
    """A linear function of last hidden states, in float32 whatever the policy computes in.

    It starts at 0: the first advantages are returns, and no random number is drawn.
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


def with_value_loss(
    critic: PPO,
    terms: LossTerms,
    values: Tensor,
    old_values: Tensor | None,
    targets: Tensor | None,
) -> LossTerms:
    """The loss of T tokens with that of their values, which is summed with the same weights.

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
    weighted = losses if terms.weights is None else terms.weights * losses
    return LossTerms(terms.loss + weighted.sum(), {**terms.stats, **stats}, terms.weights)
