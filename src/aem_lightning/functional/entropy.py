"""Entropies of tokens and responses, and how a response moves the entropy of its state. In nats."""

from __future__ import annotations

import torch
from torch import Tensor

from aem_lightning.functional.segments import check_shapes, segment_mean


def token_entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of next-token distributions over the full vocabulary, in nats.

    ``H_tok = -sum_v p(v) log p(v)``, ``p = softmax(logits)`` (AEM, arXiv 2605.00425). Half
    precision is summed in float32. A logit of -inf is a token that cannot occur.

    Args:
        logits: [..., V], already divided by the sampling temperature.

    Returns:
        [...], float32 (float64 for float64 input).

    Example:
        >>> token_entropy(torch.tensor([[0.0, 0.0], [0.0, -torch.inf]]))
        tensor([0.6931, 0.0000])
    """
    kind = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logprobs = torch.log_softmax(logits.to(kind), dim=-1)
    # 0 * -inf is NaN: the clamp makes the product 0.
    return (logprobs.exp() * -logprobs.clamp_min(torch.finfo(kind).min)).sum(dim=-1)


def response_entropy(entropies: Tensor, response_index: Tensor, num_responses: int) -> Tensor:
    """Mean token entropy of each response, in nats: what AEM compares within a group.

    ``H-bar = (1/L) sum_l H_tok(s, y_<l)``: the length-normalised predictable part of the response's
    surprisal (AEM, arXiv 2605.00425).

    Args:
        entropies: Token entropies, [S, L].
        response_index: The response of each token, [S, L]; -1 outside responses.
        num_responses: Number of responses R.

    Returns:
        [R]; 0 for a response without tokens, which ``aem_coefficients`` should be told by its
        ``mask``.

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> entropies = torch.tensor([[9.0, 0.2, 0.4], [0.5, 9.0, 9.0]])
        >>> response_entropy(entropies, torch.tensor([[-1, 0, 0], [1, -1, -1]]), 3)
        tensor([0.3000, 0.5000, 0.0000])
    """
    check_shapes(entropies=entropies, response_index=response_index)
    inside = response_index >= 0
    return segment_mean(entropies[inside], response_index[inside], num_responses)


def entropy_drift(advantage: Tensor, surprisal: Tensor, response_entropy: Tensor) -> Tensor:
    """Change of the response entropy per natural-gradient step on one response.

    ``A * (S - H)``: a reward for a response more surprising than its state expects raises the
    entropy (AEM, arXiv 2605.00425, Theorem on the response-level drift). Under a plain gradient
    only the sign is comparable.

    Args:
        advantage: A, any shape.
        surprisal: ``S = -log pi(a|s)``, same shape, nats.
        response_entropy: ``H = E[S]`` at the state, same shape, nats.

    Returns:
        Same shape.

    Example:
        >>> advantage = torch.tensor([1.0, -1.0])
        >>> entropy_drift(advantage, torch.tensor([2.0, 2.0]), torch.tensor([1.5, 1.5]))
        tensor([ 0.5000, -0.5000])
    """
    return advantage * (surprisal - response_entropy)
