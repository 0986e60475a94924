"""Log-probability and entropy of tokens straight from hidden states, without a [T, V] tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

HALF = (torch.float16, torch.bfloat16)
CHUNK = 512  # tokens whose logits are there at once


def token_logprob_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of its distribution, computed in chunks of tokens.

    With ``z = hidden @ weight.T / temperature``: ``log p(y) = z_y - logsumexp(z)`` and
    ``H = -sum_v p(v) log p(v)``. Both are differentiable, in ``hidden`` and (where it requires
    grad) ``weight``: ``dz = g_lp (onehot - p) - g_H p (log p + H)``. The logits are recomputed in
    the backward pass, so the peak is a few [chunk, V] tensors however many tokens there are. The
    equations are those of a softmax; cutting the head into chunks follows arXiv 2411.09009.

    Args:
        hidden: Last hidden states, [T, d].
        weight: Output embedding, [V, d], of the same dtype.
        targets: Token ids, [T].
        temperature: Divides the logits; > 0.
        chunk: Tokens a piece.

    Returns:
        Log-probabilities [T] and entropies [T], in nats, float32 (float64 for float64 input).

    Raises:
        ValueError: Shapes that do not fit, a temperature or chunk out of range.

    Example:
        >>> hidden, weight = torch.zeros(2, 3), torch.ones(4, 3)
        >>> logprobs, entropies = token_logprob_entropy(hidden, weight, torch.tensor([0, 3]))
        >>> logprobs, entropies
        (tensor([-1.3863, -1.3863]), tensor([1.3863, 1.3863]))
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "hidden [T, d] and weight [V, d] are needed, "
            f"got {list(hidden.shape)} and {list(weight.shape)}"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"targets must be [{hidden.shape[0]}], one a row, got {list(targets.shape)}"
        )
    if not temperature > 0:
        raise ValueError(
            f"temperature={temperature}: log-probabilities need one > 0 (greedy decoding reports 1)"
        )
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: at least 1 token a piece")
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        # Cast here, once: autocast is off in the backward pass, whose logits must equal the
        # forward's.
        kind = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(kind), weight.to(kind)
    with torch.autocast(device, enabled=False):
        outputs: tuple[Tensor, Tensor] = _LogprobEntropy.apply(  # type: ignore[no-untyped-call]
            hidden, weight, targets, 1.0 / temperature, chunk
        )
    return outputs


def logprob_entropy_through(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """`token_logprob_entropy` through any ``head``, hidden states [c, d] to logits [c, V].

    Hidden states [T, d] and targets [T] are cut into chunks of c tokens. Autograd goes through the
    head and computes each chunk again in the backward pass (arXiv 2411.09009 cuts a head so): the
    peak is a few [chunk, V] tensors here too. A token whose logit is -inf adds no entropy.

    Example:
        >>> head = lambda hidden: 2 * hidden
        >>> logprob_entropy_through(head, torch.zeros(2, 4), torch.tensor([0, 3]))
        (tensor([-1.3863, -1.3863]), tensor([1.3863, 1.3863]))
    """

    def score(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logprobs = torch.log_softmax(logits / temperature, dim=-1)
        finite = logprobs.masked_fill(logprobs == -torch.inf, 0.0)
        entropies = -(logprobs.exp() * finite).sum(dim=-1)
        return logprobs.gather(1, targets[:, None])[:, 0], entropies

    if not len(targets):
        none = hidden.float().sum(dim=-1)
        return none, none
    parts = [
        checkpoint(score, part, wanted, use_reentrant=False)
        for part, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _logits(hidden: Tensor, weight: Tensor, scale: float) -> Tensor:
    """Scaled logits [c, V]: the product in the given dtype, what follows at least in float32."""
    logits = wide_product(hidden, weight)
    return logits.mul_(scale) if scale != 1.0 else logits


def wide_product(hidden: Tensor, weight: Tensor) -> Tensor:
    """``hidden @ weight.T``, [c, V], in float32 or wider.

    A GPU adds the products of half precision up in float32; rounded back before they are read,
    log-probabilities would be off by a hundredth.
    """
    half = hidden.dtype == weight.dtype and hidden.dtype in HALF
    if half and hidden.device.type == "cuda" and hasattr(torch.ops.aten.mm, "dtype"):  # torch 2.8
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    product = linear(hidden, weight)
    return product if product.dtype == torch.float64 else product.float()


def _logits_gradient(
    logprobs: Tensor,
    targets: Tensor,
    entropies: Tensor,
    grad_logprobs: Tensor,
    grad_entropies: Tensor | None,
) -> Tensor:
    """The gradient of the scaled logits, [c, V], written over ``logprobs``; the others [c, 1]."""
    if grad_entropies is None:
        grad = logprobs.exp_().mul_(-grad_logprobs)
    else:
        probs = logprobs.exp()
        grad = logprobs.add_(entropies).mul_(grad_entropies)
        grad = grad.add_(grad_logprobs).mul_(probs).neg_()
    return grad.scatter_add_(1, targets, grad_logprobs)


class _LogprobEntropy(torch.autograd.Function):
    """Keeps hidden states and two numbers a token; see ``token_logprob_entropy``."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        kind = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logprobs = torch.empty(hidden.shape[0], dtype=kind, device=hidden.device)
        entropies, normalizers = torch.empty_like(logprobs), torch.empty_like(logprobs)
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = _logits(hidden[part], weight, scale)
            normalizers[part] = torch.logsumexp(logits, dim=-1)
            logits.sub_(normalizers[part, None])
            logprobs[part] = logits.gather(1, targets[part, None])[:, 0]
            entropies[part] = -logits.exp().mul_(logits).sum(dim=-1)
            del logits  # now, not when the next chunk's are there
        ctx.save_for_backward(hidden, weight, targets, normalizers, entropies)
        ctx.scale, ctx.chunk = scale, chunk
        # An output without a gradient (entropy_coef=0) arrives as None, and its work is skipped.
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropies: Tensor | None) -> Any:
        hidden, weight, targets, normalizers, entropies = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = (
            weight.new_zeros(weight.shape, dtype=normalizers.dtype) if needs_weight else None
        )
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(normalizers)
        for start in range(0, hidden.shape[0], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            grad = _logits_gradient(
                _logits(hidden[part], weight, ctx.scale).sub_(normalizers[part, None]),
                targets[part, None],
                entropies[part, None],
                grad_logprobs[part, None],
                None if grad_entropies is None else grad_entropies[part, None],
            )
            grad = grad.mul_(ctx.scale).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight
            if grad_weight is not None:
                grad_weight += (grad.t() @ hidden[part]).to(grad_weight.dtype)
            del grad  # now, not when the next chunk's logits are there
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None
