"""Coefficients that rescale advantages by entropy: AEM within a group, EMPG's gain over a batch."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from aem_lightning.functional.segments import (
    check_rows,
    check_shapes,
    counted_rows,
    segment_range,
    segment_sum,
)

Direction = Literal["paper", "reversed", "shuffled"]


def aem_coefficients(
    entropy: Tensor,
    group: Tensor,
    *,
    sharpness: float = 1.0,
    min_range: float = 0.1,
    direction: Direction = "paper",
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The factor alpha of Adaptive Entropy Modulation, by which a response's advantage is scaled.

    Within each group, with ``H~ = (H-bar - min) / (max - min)``::

        alpha = exp(-sharpness * H~) / mean_group(exp(-sharpness * H~))

    so that alpha > 0 and its mean over the group is 1 (AEM, arXiv 2605.00425; ``sharpness`` is the
    paper's lambda). A group whose range is under the gate has alpha = 1: there the differences are
    noise. The scope is the caller's choice of ``group``: task (the paper), trajectory, batch, or
    anchor state.

    Args:
        entropy: Mean token entropy H-bar of each response, [R], nats. No gradient flows through.
        group: The group of each response, [R], any integers.
        sharpness: 0 gives exactly 1 everywhere; at 1, alpha lies in (1/e, e).
        min_range: The gate, in nats.
        direction: ``paper``; ``reversed`` flips the sign of the exponent; ``shuffled`` permutes
            alpha within each group. The last two are the paper's ablations.
        mask: Responses that count, [R] bool; the others (empty, or of a trajectory that is left out
            of the loss) enter no statistic and have alpha = 1.
        weight: How much each response counts in the mean that alpha is divided by, [R]; e.g. its
            tokens, for a mean over tokens. ``None`` counts responses.
        generator: Randomness for ``shuffled``.

    Returns:
        [R], detached.

    Raises:
        ValueError: A counted entropy that is NaN or infinite, naming its responses; an unknown
            direction; shapes that differ; a negative ``min_range``.

    Example:
        >>> aem_coefficients(torch.tensor([0.2, 0.5, 0.8, 0.3]), torch.tensor([0, 0, 0, 1]))
        tensor([1.5194, 0.9216, 0.5590, 1.0000])
    """
    if direction not in get_args(Direction):
        raise ValueError(f"direction={direction!r} is unknown: choose one of {get_args(Direction)}")
    if not min_range >= 0:
        raise ValueError(f"min_range={min_range} is not allowed: a width in nats >= 0")
    check_rows(entropy=entropy, group=group, mask=mask, weight=weight)
    entropy = entropy.detach()
    keep, values, ids, count = counted_rows(entropy, group, mask, "entropies of responses")
    slope = -sharpness if direction != "reversed" else sharpness
    counted = torch.ones_like(values) if weight is None else weight[keep].to(values.dtype)
    alpha = _normalised_gain(values, ids, count, slope, min_range, counted)
    if direction == "shuffled":
        alpha = _shuffled(alpha, ids, generator)
    return torch.ones_like(entropy).index_copy(0, keep, alpha)


def empg_gain(entropy: Tensor, *, k: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """The self-calibrating gain g of EMPG: certain steps weigh more, with mean 1 over the batch.

    ``g = exp(-k * H~) / mean(exp(-k * H~))`` with ``H~`` scaled to [0, 1] over the whole batch
    (EMPG, arXiv 2509.09265).

    Args:
        entropy: Mean token entropy of each response, [R], nats. No gradient flows through.
        k: How much certain steps are preferred; 0 gives exactly 1.
        mask: Responses that count, [R] bool; the others enter no statistic and have a gain of 1.

    Returns:
        [R], detached; ones where all entropies are equal.

    Raises:
        ValueError: An entropy that is NaN or infinite, naming its responses.

    Example:
        >>> empg_gain(torch.tensor([0.2, 0.5, 0.8]))
        tensor([1.5194, 0.9216, 0.5590])
    """
    one_batch = torch.zeros_like(entropy, dtype=torch.long)
    return aem_coefficients(entropy, one_batch, sharpness=k, min_range=0.0, mask=mask)


def repo_advantages(advantages: Tensor, logprobs: Tensor, zeta: float) -> Tensor:
    """Advantages of tokens, shifted towards rare ones by a positive ``zeta``: REPO-R.

    ``max(0, A (1 - zeta logp))`` where A > 0, ``min(0, A (1 + zeta logp))`` where A < 0; 0 stays.
    arXiv 2603.11682.

    Args:
        advantages: Any shape.
        logprobs: Under the current policy, same shape; no gradient flows through.
        zeta: 0 changes nothing.

    Returns:
        Same shape.

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> repo_advantages(torch.tensor([1.0, -1.0, -1.0]), torch.tensor([-2.0, -2.0, -20.0]), 0.1)
        tensor([ 1.2000, -0.8000,  0.0000])
    """
    check_shapes(advantages=advantages, logprobs=logprobs)
    pull = zeta * logprobs.detach()
    up = (advantages * (1 - pull)).clamp(min=0)
    down = (advantages * (1 + pull)).clamp(max=0)
    return torch.where(advantages > 0, up, torch.where(advantages < 0, down, advantages))


def empg_bonus(
    entropy: Tensor,
    trajectory: Tensor,
    turn: Tensor,
    *,
    k: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """EMPG's future clarity f: a response earns the certainty of the one that follows it.

    ``f_t = exp(-k * H~_{t+1})`` with ``H~`` scaled to [0, 1] over the whole batch; 0 where the
    trajectory has no next response (EMPG, arXiv 2509.09265).

    Args:
        entropy: Mean token entropy of each response, [R], nats. No gradient flows through.
        trajectory: The trajectory of each response, [R], any integers.
        turn: Its place in time within the trajectory, [R].
        k: How fast the bonus falls with the next response's entropy.
        mask: Responses that count, [R] bool; the others enter no statistic and earn nothing.

    Returns:
        [R], detached.

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> entropy, turn = torch.tensor([0.2, 0.5, 0.8]), torch.tensor([0, 1, 2])
        >>> empg_bonus(entropy, torch.tensor([0, 0, 0]), turn)
        tensor([0.6065, 0.3679, 0.0000])
    """
    check_rows(entropy=entropy, trajectory=trajectory, turn=turn, mask=mask)
    counted = torch.ones_like(turn, dtype=torch.bool) if mask is None else mask
    if not counted.any():
        return torch.zeros_like(entropy)
    values = entropy.detach()
    low, high = values[counted].min(), values[counted].max()
    clarity = torch.exp(
        -k * (values - low) / (high - low).clamp_min(torch.finfo(values.dtype).tiny)
    )
    # In the order of trajectory and turn, the next response is the next entry.
    order = turn.argsort(stable=True)
    order = order[trajectory[order].argsort(stable=True)]
    here, following = order[:-1], order[1:]
    joined = (trajectory[here] == trajectory[following]) & counted[here] & counted[following]
    bonus = torch.zeros_like(values)
    return bonus.index_copy(0, here[joined], clarity[following[joined]])


def _normalised_gain(
    values: Tensor,
    ids: Tensor,
    count: int,
    slope: float,
    min_range: float,
    weight: Tensor,
) -> Tensor:
    """``exp(slope * H~)`` over its segment's mean, [n]; 1 where the range is 0 or gated."""
    low, high = segment_range(values, ids, count)
    width = high - low
    gated = (width < min_range) | (width == 0)
    scaled = (values - low[ids]) / torch.where(gated, torch.ones_like(width), width)[ids]
    gain = torch.exp(slope * scaled)
    mean = segment_sum(gain * weight, ids, count) / segment_sum(weight, ids, count)
    alpha = gain / mean[ids]
    return torch.where(gated[ids], torch.ones_like(alpha), alpha)


def _shuffled(alpha: Tensor, ids: Tensor, generator: torch.Generator | None) -> Tensor:
    """Alpha permuted at random within each segment, [n]."""
    device = generator.device if generator is not None else torch.device("cpu")
    order = torch.randperm(alpha.numel(), generator=generator, device=device).to(ids.device)
    # Both orders list the segments one after the other; only the second mixes within them.
    plain = torch.argsort(ids, stable=True)
    mixed = order[torch.argsort(ids[order], stable=True)]
    return torch.empty_like(alpha).index_copy(0, mixed, alpha[plain])
