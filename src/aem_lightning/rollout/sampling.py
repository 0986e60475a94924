"""Drawing tokens by inverse CDF: one uniform a token, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def request_uniforms(seed: int, count: int) -> list[float]:
    """The uniforms in [0, 1) that a request spends, one a token.

    All are drawn at once: the number that a response ends up using does not move any other stream.
    """
    # The CPU generator reads only the low 32 bits of its seed; folding lets the high ones count
    # too.
    folded = (seed ^ (seed >> 32)) & 0xFFFF_FFFF
    generator = torch.Generator().manual_seed(folded)
    uniforms: list[float] = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    return uniforms


def allowed_tokens(choices: Sequence[Sequence[int] | None], logits: Tensor) -> Tensor | None:
    """The tokens that each row may draw as a mask, [b, V] bool; ``None`` where no row is limited.

    ``choices`` has the token ids of each row, ``None`` for all; ``logits`` are [b, V].
    """
    limited = {row: tokens for row, tokens in enumerate(choices) if tokens is not None}
    if not limited:
        return None
    pairs = torch.tensor(
        [(row, token) for row, tokens in limited.items() for token in tokens], device=logits.device
    )
    mask = torch.ones(logits.shape, dtype=torch.bool, device=logits.device)
    mask[list(limited)] = False
    mask[pairs[:, 0], pairs[:, 1]] = True
    return mask


def draw(
    logits: Tensor, temperature: Tensor, uniforms: Tensor, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One token a row by inverse CDF, with its log-probability and the entropy of its distribution.

    The token is the first whose cumulative probability exceeds the uniform. The sum runs in
    float64: in float32 the tail of a large vocabulary would be rounded away.

    Args:
        logits: Next-token logits, [b, V].
        temperature: Divides the logits, [b]; 0 takes the most likely token and reports temperature
            1.
        uniforms: Values in [0, 1), [b], float64.
        allowed: The tokens that may be drawn, [b, V] bool; ``None`` for all.

    Returns:
        Tokens [b], log-probabilities [b] and entropies [b], the last two in nats and float32, and
        of the whole vocabulary also where not all of it was ``allowed``.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 9.0]])
        >>> uniforms = torch.tensor([0.75, 0.1], dtype=torch.float64)
        >>> tokens, logprobs, entropies = draw(logits, torch.tensor([1.0, 0.0]), uniforms)
        >>> tokens.tolist(), round(entropies[0].item(), 4)
        ([1, 1], 0.6931)
    """
    greedy = temperature == 0
    divisor = torch.where(greedy, torch.ones_like(temperature), temperature)
    logprobs = torch.log_softmax(logits.float() / divisor[:, None], dim=-1)
    probs = logprobs.exp()
    # A logit of -inf has p = 0 and log p = -inf: the clamp makes their product 0 instead of NaN.
    entropies = -(probs * logprobs.clamp_min(torch.finfo(torch.float32).min)).sum(dim=-1)
    scores = logprobs
    if allowed is not None:
        # Made to sum to 1 again: what is allowed may be too improbable for float32.
        scores = torch.log_softmax(logprobs.masked_fill(~allowed, -torch.inf), dim=-1)
        probs = scores.exp()
    cdf = probs.double().cumsum(dim=-1)
    total = cdf[:, -1:]
    # Staying below the total keeps the index on a token with p > 0 even where u * total rounds up
    # to it.
    target = torch.minimum(
        uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total))
    )
    # Only NaN logits search past the end; the caller sees them in the entropy.
    sampled = torch.searchsorted(cdf, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    tokens = torch.where(greedy, scores.argmax(dim=-1), sampled)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0], entropies


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every submodule's own mode comes back afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        # A trainer may evaluate in inference mode; a cache outlives it and needs ordinary tensors.
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        # Weights that autocast cast and cached here carry no gradient. Some releases of torch
        # would silently use them in a training pass of the same autocast region.
        if torch.is_autocast_cache_enabled():  # else it is another thread's
            torch.clear_autocast_cache()
