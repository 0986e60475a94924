"""Returns over time: discounted sums and generalised advantage estimates."""

from __future__ import annotations

import torch
from torch import Tensor


def discounted_returns(rewards: Tensor, gamma: float) -> Tensor:
    """The discounted sum of rewards from each time on.

    ``G_t = r_t + gamma * G_{t+1}``, with ``G_T = 0``.

    Args:
        rewards: [..., T].
        gamma: Discount.

    Returns:
        [..., T].

    Example:
        >>> discounted_returns(torch.tensor([0.0, 0.0, 10.0]), 0.5)
        tensor([ 2.5000,  5.0000, 10.0000])
    """
    returns = torch.empty_like(rewards)
    following = torch.zeros_like(rewards[..., 0]) if rewards.shape[-1] else rewards
    for time in range(rewards.shape[-1] - 1, -1, -1):
        following = rewards[..., time] + gamma * following
        returns[..., time] = following
    return returns


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the returns that a value head learns (arXiv 1506.02438).

    ``A_t = delta_t + gamma * lam * A_{t+1}`` with ``delta_t = r_t + gamma * V_{t+1} - V_t``. The
    value after the last time is 0: an episode ends there.

    Args:
        rewards: [..., T].
        values: V_t, same shape.
        gamma: Discount.
        lam: Weight of the longer estimates; 1 gives the discounted return minus the value.

    Returns:
        Advantages and ``returns = advantages + values``, [..., T] each.

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> gae(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5]), gamma=1.0, lam=1.0)
        (tensor([0.5000, 0.5000]), tensor([1., 1.]))
    """
    if rewards.shape != values.shape:
        raise ValueError(
            "rewards and values must have one shape, "
            f"got {list(rewards.shape)} and {list(values.shape)}"
        )
    following = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], dim=-1)
    advantages = discounted_returns(rewards + gamma * following - values, gamma * lam)
    return advantages, advantages + values
