"""Pieces of the policy loss, element by element: how to average them is the caller's business."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.distributions import Bernoulli, kl_divergence

from aem_lightning.functional.segments import check_shapes, segment_mean

Aggregation = Literal["token", "sequence", "constant"]
Divergence = Literal["tv", "kl"]

# exp(20) is 5e8, far behind every clip; beyond it the gradient of a clipped ratio would be 0 * inf
# = NaN.
_MAX_LOG_RATIO = 20.0


def sequence_ratio(
    logprobs: Tensor, old_logprobs: Tensor, response_index: Tensor, num_responses: int
) -> Tensor:
    """Length-normalised probability ratio of each response.

    ``s = exp(mean_l(logp_l - old_logp_l))``: GSPO (arXiv 2507.18071). Differentiable in
    ``logprobs``.

    Args:
        logprobs: Log-probability of each token under the policy, [S, L].
        old_logprobs: The same before the update, [S, L].
        response_index: The response of each token, [S, L]; -1 outside responses.
        num_responses: Number of responses R.

    Returns:
        [R]; 1 for a response without tokens.

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> logprobs, old = torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[-1.5, -2.5, 0.0]])
        >>> sequence_ratio(logprobs, old, torch.tensor([[0, 0, -1]]), 1)
        tensor([1.6487])
    """
    check_shapes(logprobs=logprobs, old_logprobs=old_logprobs, response_index=response_index)
    inside = response_index >= 0
    log_ratio = (logprobs - old_logprobs)[inside]
    return segment_mean(log_ratio, response_index[inside], num_responses).exp()


def clipped_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = 3.0,
) -> tuple[Tensor, Tensor]:
    """The clipped policy-gradient loss of each element, and where a clip stops its gradient.

    With ``r = exp(logp - old_logp)``::

        loss = -min(r * A, clip(r, 1 - clip_low, 1 + clip_high) * A),  and at most -dual_clip * A
        where A < 0

    PPO (arXiv 1707.06347); a higher ``clip_high`` is DAPO's clip-higher (arXiv 2503.14476); the
    bound for negative advantages is the dual clip (arXiv 1912.09729). Elements are tokens, or
    responses with the mean of their log-probabilities (GSPO).

    Args:
        logprobs: Under the policy, any shape.
        old_logprobs: Before the update, same shape.
        advantages: Same shape; no gradient flows through.
        clip_low: Distance below 1; in [0, 1).
        clip_high: Distance above 1; >= 0.
        dual_clip: Bound c > 1 on the ratio where A < 0; ``None`` for no bound.

    Returns:
        Loss and the bool mask of clipped elements, both of the given shape.

    Raises:
        ValueError: Shapes that differ, or a clip out of range.

    Example:
        >>> logprobs = torch.tensor([0.5, 0.5, 2.0]).log()
        >>> old = torch.tensor([0.5, 0.25, 0.5]).log()
        >>> clipped_surrogate(logprobs, old, torch.tensor([1.0, 1.0, -1.0]))
        (tensor([-1.0000, -1.2000,  3.0000]), tensor([False,  True,  True]))
    """
    if not (0 <= clip_low < 1 and clip_high >= 0):
        raise ValueError(
            f"clip_low={clip_low} and clip_high={clip_high} are not allowed: "
            "0 <= clip_low < 1 and clip_high >= 0"
        )
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip={dual_clip}: give a bound > 1, or null for none")
    check_shapes(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    advantages = advantages.detach()
    log_ratio = (logprobs - old_logprobs).clamp(max=_MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    plain = -ratio * advantages
    bounded = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    loss = torch.maximum(plain, bounded)
    clipped = bounded > plain
    if dual_clip is not None:
        limit = -dual_clip * advantages
        beyond = (advantages < 0) & (loss > limit)
        loss = torch.where(beyond, limit, loss)
        clipped = clipped | beyond
    return loss, clipped


def cispo_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 1.0,
    clip_high: float = 5.0,
) -> tuple[Tensor, Tensor]:
    """Policy gradients under a clipped importance weight, and where it is clipped.

    ``loss = -sg(clip(r, 1 - clip_low, 1 + clip_high)) * A * logp``, sg being a stopped gradient:
    no token loses its own. CISPO (arXiv 2506.13585).

    Args:
        logprobs: Under the policy, any shape.
        old_logprobs: Before the update, same shape.
        advantages: Same shape; no gradient flows through.
        clip_low: Distance below 1; in [0, 1], and 1 does not clip.
        clip_high: Distance above 1; >= 0.

    Returns:
        Loss and the bool mask of clipped weights, both of the given shape.

    Raises:
        ValueError: Shapes that differ, or a clip out of range.

    Example:
        >>> logprobs, old = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -5.0])
        >>> cispo_surrogate(logprobs, old, torch.tensor([1.0, 1.0]))
        (tensor([ 1., 12.]), tensor([False,  True]))
    """
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        raise ValueError(
            f"clip_low={clip_low} and clip_high={clip_high} are not allowed: "
            "0 <= clip_low <= 1 and clip_high >= 0"
        )
    check_shapes(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    ratio = (logprobs - old_logprobs).detach().clamp(max=_MAX_LOG_RATIO).exp()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -weight * advantages.detach() * logprobs, weight != ratio


def dppo_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    sampler_logprobs: Tensor,
    *,
    delta: float = 0.2,
    divergence: Divergence = "tv",
) -> tuple[Tensor, Tensor]:
    """The policy-gradient loss outside a trust region of probabilities, and where that masks it.

    ``loss = -r * A``, and 0 without a gradient where the sampled token's probability has gone
    beyond the region in the direction of its advantage: ``pi - mu > delta`` where A > 0,
    ``mu - pi > delta`` where A < 0. With ``divergence=kl`` beyond is where the binary divergence
    KL(mu || pi) of that token against all others is over ``delta``. mu are the sampler's
    probabilities. DPPO (arXiv 2602.04879).

    Args:
        logprobs: Under the policy, any shape.
        old_logprobs: Before the update, same shape.
        advantages: Same shape; no gradient flows through.
        sampler_logprobs: As the engine saw them, same shape.
        delta: The region's size, > 0.
        divergence: ``tv`` or ``kl``.

    Returns:
        Loss and the bool mask of masked elements, both of the given shape.

    Raises:
        ValueError: Shapes that differ, or a size or divergence out of range.

    Example:
        >>> logprobs, old = torch.tensor([0.9, 0.5]).log(), torch.tensor([0.5, 0.4]).log()
        >>> dppo_surrogate(logprobs, old, torch.ones(2), old)
        (tensor([ 0.0000, -1.2500]), tensor([ True, False]))
    """
    if not delta > 0 or divergence not in get_args(Divergence):
        raise ValueError(
            f"delta={delta} and divergence={divergence!r} are not allowed: a number > 0, and one "
            f"of {get_args(Divergence)}"
        )
    columns = {"old_logprobs": old_logprobs, "sampler_logprobs": sampler_logprobs}
    check_shapes(logprobs=logprobs, advantages=advantages, **columns)
    advantages = advantages.detach()
    ratio = (logprobs - old_logprobs).clamp(max=_MAX_LOG_RATIO).exp()
    policy, sampler = logprobs.detach().exp(), sampler_logprobs.exp()
    moved = policy - sampler
    if divergence == "tv":
        beyond = moved.abs() > delta
    else:
        sides = (Bernoulli(p.clamp(max=1), validate_args=False) for p in (sampler, policy))
        beyond = kl_divergence(*sides) > delta
    masked = beyond & (moved * advantages > 0)
    return torch.where(masked, 0.0, -ratio * advantages), masked


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) at each sampled token: unbiased and never negative.

    ``k3 = exp(d) - d - 1`` with ``d = ref_logp - logp`` (Schulman, "Approximating KL divergence";
    used by GRPO, arXiv 2402.03300). Nats; d is cut at 20.

    Args:
        logprobs: Of the sampled tokens under the policy, any shape.
        ref_logprobs: The same under the reference, same shape.

    Returns:
        Same shape.

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> kl_k3(torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -2.0]))
        tensor([0.0000, 0.3679])
    """
    check_shapes(logprobs=logprobs, ref_logprobs=ref_logprobs)
    difference = (ref_logprobs - logprobs).clamp(max=_MAX_LOG_RATIO)
    # expm1 keeps the digits that exp(d) - 1 loses while policy and reference are close.
    return torch.expm1(difference) - difference


def aggregation_weights(
    lengths: Tensor,
    aggregation: Aggregation = "token",
    *,
    constant: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight of each token in a sum that its caller divides by the number of units.

    =============  ==============  ============  ===============================================
    aggregation    weight          units         source
    =============  ==============  ============  ===============================================
    ``token``      1               tokens        DAPO's token mean (arXiv 2503.14476)
    ``sequence``   1 / length      responses     GRPO's mean of means (arXiv 2402.03300)
    ``constant``   1 / constant    responses     Dr.GRPO (arXiv 2503.20783): no length bias
    =============  ==============  ============  ===============================================

    The units are counted over all micro-batches and ranks of an update, so how a minibatch is cut
    does not change its gradient.

    Args:
        lengths: Tokens of the response that each token is in, [T].
        aggregation: ``token``, ``sequence`` or ``constant``.
        constant: The divisor of ``constant``, e.g. the most tokens that a response may have.
        dtype: Of the weights.

    Returns:
        [T].

    Raises:
        ValueError: An unknown aggregation, or ``constant`` without a number >= 1.

    Example:
        >>> lengths = torch.tensor([1, 4, 4, 4, 4])
        >>> aggregation_weights(lengths, "sequence")
        tensor([1.0000, 0.2500, 0.2500, 0.2500, 0.2500])
        >>> aggregation_weights(lengths, "constant", constant=5)
        tensor([0.2000, 0.2000, 0.2000, 0.2000, 0.2000])
    """
    if aggregation not in get_args(Aggregation):
        raise ValueError(f"aggregation={aggregation!r}: choose one of {get_args(Aggregation)}")
    if aggregation == "sequence":
        return 1.0 / lengths.clamp(min=1).to(dtype)
    if aggregation == "token":
        return torch.ones_like(lengths, dtype=dtype)
    if constant is None or constant < 1:
        raise ValueError(f"constant={constant}: aggregation='constant' needs a number >= 1")
    return torch.full_like(lengths, 1.0 / constant, dtype=dtype)


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float = 0.2
) -> Tensor:
    """Squared error of each value, or of the value kept near the old one: whichever is larger.

    ``0.5 * max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2)``: the value loss of PPO
    implementations (arXiv 1707.06347; arXiv 2005.12729 on the clip).

    Args:
        values: From the value head, any shape.
        old_values: Before the update, same shape.
        returns: What they should be, same shape; no gradient flows through.
        clip: Distance c from the old value; > 0.

    Returns:
        Same shape.

    Raises:
        ValueError: Shapes that differ, or a clip out of range.

    Example:
        >>> clipped_value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([2.0]))
        tensor([1.6200])
    """
    if not clip > 0:
        raise ValueError(f"clip={clip}: give a distance > 0")
    check_shapes(values=values, old_values=old_values, returns=returns)
    near = torch.clamp(values, old_values - clip, old_values + clip)
    return 0.5 * torch.maximum((values - returns).square(), (near - returns).square())
