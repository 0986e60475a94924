"""Base advantages of the group-based estimators: how much better than its group something was."""

from __future__ import annotations

import torch
from torch import Tensor

from aem_lightning.functional.segments import (
    check_rows,
    counted_rows,
    segment_ids,
    segment_mean,
    segment_range,
    segment_sum,
)

# Squares of larger float32 values overflow: an infinite deviation would call every group uniform.
_SQUARABLE = 1e15


def grpo_advantages(
    returns: Tensor,
    group: Tensor,
    *,
    normalize_std: bool = True,
    eps: float = 1e-6,
    mask: Tensor | None = None,
) -> Tensor:
    """Group-normalised returns: ``A = (R - mean) / (std + eps)`` over the trajectories of a group.

    GRPO (arXiv 2402.03300); without the division Dr.GRPO (arXiv 2503.20783). The standard deviation
    is the unbiased one. A group whose returns are all equal, a group of one included, has advantage
    exactly 0.

    Args:
        returns: One return a trajectory, [N].
        group: The group of each, [N], any integers.
        normalize_std: Divide by the standard deviation.
        eps: Added to the standard deviation.
        mask: Trajectories that count, [N] bool; the others enter no statistic and have advantage 0.

    Returns:
        [N].

    Raises:
        ValueError: Shapes that differ, or a return that is not finite.

    Example:
        >>> grpo_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 0, 1, 1]))
        tensor([ 1.1547, -0.5773, -0.5773,  0.0000,  0.0000])
    """
    check_rows(returns=returns, group=group, mask=mask)
    keep, values, ids, count = counted_rows(returns, group, mask, "returns")
    centred, sizes = _centred(values, ids, count)
    if normalize_std:
        variance = segment_sum(centred.square(), ids, count) / (sizes - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + eps)[ids]
    return torch.zeros_like(returns).index_copy(0, keep, centred.to(returns.dtype))


def rloo_advantages(returns: Tensor, group: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Return minus the mean return of the *other* trajectories of the group.

    ``A_i = R_i - mean_{j != i} R_j = G / (G - 1) * (R_i - mean)``: RLOO (arXiv 2402.14740).

    Args:
        returns: One return a trajectory, [N].
        group: The group of each, [N], any integers.
        mask: Trajectories that count, [N] bool; the others enter no statistic and have advantage 0.

    Returns:
        [N]; 0 for a group of one.

    Raises:
        ValueError: Shapes that differ, or a return that is not finite.

    Example:
        >>> rloo_advantages(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([4, 4, 4]))
        tensor([ 1.0000, -0.5000, -0.5000])
    """
    check_rows(returns=returns, group=group, mask=mask)
    keep, values, ids, count = counted_rows(returns, group, mask, "returns")
    centred, sizes = _centred(values, ids, count)
    centred = centred * (sizes / (sizes - 1).clamp(min=1))[ids]
    return torch.zeros_like(returns).index_copy(0, keep, centred.to(returns.dtype))


def maxrl_advantages(returns: Tensor, group: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Returns against the group's mean, in units of it: ``A = (R - m) / |m|``, 0 where m is 0.

    A task that is seldom solved counts more than one that mostly is: the maximum-likelihood
    objective to first order. MaxRL (arXiv 2602.02710).

    Args:
        returns: One return a trajectory, [N].
        group: The group of each, [N], any integers.
        mask: Trajectories that count, [N] bool; the others enter no statistic and have advantage 0.

    Returns:
        [N].

    Raises:
        ValueError: Shapes that differ, or a return that is not finite.

    Example:
        >>> maxrl_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([0, 0, 0, 0]))
        tensor([ 3., -1., -1., -1.])
    """
    check_rows(returns=returns, group=group, mask=mask)
    keep, values, ids, count = counted_rows(returns, group, mask, "returns")
    centred, _ = _centred(values, ids, count)
    mean = segment_mean(values.to(centred.dtype), ids, count).abs()[ids]
    advantages = torch.where(mean > 0, centred / mean, 0.0)
    return torch.zeros_like(returns).index_copy(0, keep, advantages.to(returns.dtype))


def qae_advantages(
    returns: Tensor,
    group: Tensor,
    *,
    quantile: float = 0.4,
    normalize_std: bool = True,
    eps: float = 1e-6,
    mask: Tensor | None = None,
) -> Tensor:
    """Returns against a quantile of the group's: ``A = (R - b) / (std + eps)``.

    The baseline b is the smallest return that at least a share ``quantile`` of the group does not
    exceed. With returns of 0 and 1 and a share p of successes, only successes have an advantage
    (A > 0) where p <= 1 - quantile, and only failures (A < 0) where p is larger. QAE (arXiv
    2509.22611). The standard deviation is the unbiased one.

    Args:
        returns: One return a trajectory, [N].
        group: The group of each, [N], any integers.
        quantile: K, in (0, 1].
        normalize_std: Divide by the standard deviation.
        eps: Added to the standard deviation.
        mask: Trajectories that count, [N] bool; the others enter no statistic and have advantage 0.

    Returns:
        [N]; 0 for a group whose returns are all equal.

    Raises:
        ValueError: Shapes that differ, a return that is not finite, or a share out of range.

    Example:
        >>> group = torch.zeros(4, dtype=torch.long)
        >>> qae_advantages(torch.tensor([1.0, 1.0, 0.0, 0.0]), group)
        tensor([1.7320, 1.7320, 0.0000, 0.0000])
        >>> qae_advantages(torch.tensor([1.0, 1.0, 1.0, 0.0]), group)
        tensor([ 0.0000,  0.0000,  0.0000, -2.0000])
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile={quantile} is not allowed: a share in (0, 1]")
    check_rows(returns=returns, group=group, mask=mask)
    keep, values, ids, count = counted_rows(returns, group, mask, "returns")
    centred, sizes = _centred(values, ids, count)
    variance = segment_sum(centred.square(), ids, count) / (sizes - 1).clamp(min=1)
    order = torch.argsort(values, stable=True)
    order = order[torch.argsort(ids[order], stable=True)]  # by group, and by value within it
    start = sizes.cumsum(0) - sizes
    # An eps, since 0.4 * 5 must count as 2.
    place = start + torch.ceil(quantile * sizes - 1e-9).clamp(min=1) - 1
    advantages = values - values[order][place.long()][ids]
    if normalize_std:
        advantages = advantages / (variance.sqrt() + eps)[ids]
    return torch.zeros_like(returns).index_copy(0, keep, advantages.to(returns.dtype))


def gigpo_step_advantages(
    step_returns: Tensor,
    group: Tensor,
    anchor: Tensor,
    *,
    normalize_std: bool = True,
    eps: float = 1e-6,
    mask: Tensor | None = None,
) -> Tensor:
    """Step advantages among the turns of a group that answer the same observation.

    The step part ``A_S`` of GiGPO (arXiv 2505.10978): as ``grpo_advantages`` over discounted step
    returns, with (group, anchor) in place of the group.

    Args:
        step_returns: Discounted return from each turn on, [R].
        group: The group of each response, [R], any integers.
        anchor: Id of the observation that it answers, [R], equal where the observations are.
        normalize_std: Divide by the standard deviation.
        eps: Added to the standard deviation.
        mask: Responses that count, [R] bool; the others enter no statistic and have advantage 0.

    Returns:
        [R]; 0 for an observation that the group met once.

    Raises:
        ValueError: Shapes that differ, or a return that is not finite.

    Example:
        >>> steps, group = torch.tensor([1.0, 0.0, 5.0]), torch.tensor([0, 0, 0])
        >>> gigpo_step_advantages(steps, group, torch.tensor([8, 8, 9]))
        tensor([ 0.7071, -0.7071,  0.0000])
    """
    check_rows(step_returns=step_returns, group=group, anchor=anchor, mask=mask)
    ids, _ = segment_ids(group, anchor)
    return grpo_advantages(step_returns, ids, normalize_std=normalize_std, eps=eps, mask=mask)


def whiten(values: Tensor, *, eps: float = 1e-6, mask: Tensor | None = None) -> Tensor:
    """Values shifted and scaled to mean 0 and standard deviation 1 over all that count.

    ``(x - mean) / (std + eps)`` with the unbiased standard deviation: the batch normalisation of
    advantages of PPO implementations, and of returns the advantages of REINFORCE++ (arXiv
    2501.03262), which compares a trajectory with every other one and needs no groups.

    Args:
        values: [N].
        eps: Added to the standard deviation.
        mask: Values that count, [N] bool; the others enter no statistic and come back as 0.

    Returns:
        [N]; zeros where all that count are equal.

    Raises:
        ValueError: Shapes that differ, or a counted value that is not finite.

    Example:
        >>> whiten(torch.tensor([1.0, 2.0, 3.0]))
        tensor([-1.0000,  0.0000,  1.0000])
    """
    one_batch = torch.zeros_like(values, dtype=torch.long)
    return grpo_advantages(values, one_batch, eps=eps, mask=mask)


def _centred(values: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Values minus the mean of their group, [n], and the group sizes, [K]."""
    if (values.abs() > _SQUARABLE).any():
        values = values.double()
    low, high = segment_range(values, ids, count)
    centred = values - segment_mean(values, ids, count)[ids]
    # A mean of equal values can be off by a rounding, which a division by std + eps would blow up.
    centred = torch.where((low == high)[ids], torch.zeros_like(centred), centred)
    return centred, segment_sum(torch.ones_like(values), ids, count)
