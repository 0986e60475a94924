"""Weights that make up for a sampler whose log-probabilities are not quite the trainer's."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from aem_lightning.functional.segments import check_rows, segment_ids, segment_sum

Level = Literal["token", "sequence"]
Mode = Literal["truncate", "mask"]


def importance_weights(
    logprobs: Tensor,
    sampler_logprobs: Tensor,
    responses: Tensor,
    *,
    level: Level = "token",
    mode: Mode = "truncate",
    limit: float = 2.0,
) -> Tensor:
    """Truncated importance weights between the sampler and the trainer, token by token.

    With ``w = exp(logp - logp_sampler)``, of the token or (``sequence``) of its whole response,
    a product over tokens::

        truncate: min(w, limit)        mask: w where 1 / limit <= w <= limit, else 0

    The engine that samples and the trainer that scores round differently, so "on-policy" is a
    little off-policy. Truncated importance sampling (Ionides 2008; Yao et al., "Your efficient RL
    framework secretly brings you off-policy RL training", 2025); masking as in IcePop (Ling team,
    arXiv 2510.18855).

    Args:
        logprobs: Of the sampled tokens under the trainer before the update, [T].
        sampler_logprobs: The same as the sampler saw them, [T].
        responses: The response of each token, [T], any integers.
        level: ``token`` or ``sequence``.
        mode: ``truncate`` or ``mask``.
        limit: The largest weight; >= 1.

    Returns:
        [T], detached.

    Raises:
        ValueError: An unknown level or mode, a limit under 1, shapes that differ.

    Example:
        >>> logprobs, sampler = torch.tensor([0.5, 0.8]).log(), torch.tensor([0.5, 0.1]).log()
        >>> responses = torch.tensor([0, 0])
        >>> importance_weights(logprobs, sampler, responses)
        tensor([1., 2.])
        >>> importance_weights(logprobs, sampler, responses, level="sequence", mode="mask")
        tensor([0., 0.])
    """
    for name, value, allowed in (("level", level, Level), ("mode", mode, Mode)):
        if value not in get_args(allowed):
            raise ValueError(f"{name}={value!r}: choose one of {get_args(allowed)}")
    if not limit >= 1:
        raise ValueError(f"limit={limit}: give the largest weight, >= 1")
    check_rows(logprobs=logprobs, sampler_logprobs=sampler_logprobs, responses=responses)
    log_weights = (logprobs - sampler_logprobs).detach()
    if level == "sequence":
        ids, count = segment_ids(responses)
        log_weights = segment_sum(log_weights, ids, count)[ids]
    # Cut first: the exponential of a long response's sum may be infinite.
    weights = log_weights.clamp(max=80.0).exp()
    if mode == "truncate":
        return weights.clamp(max=limit)
    inside = (weights <= limit) & (weights >= 1 / limit)
    return torch.where(inside, weights, torch.zeros_like(weights))
