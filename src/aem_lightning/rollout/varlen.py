"""FlashAttention over rows of unlike lengths, on GPUs that have it: `torch.nn.attention.varlen`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aem_lightning.functional.logprob import HALF

Kernel = Callable[..., Any]

_SIZES = range(8, 257, 8)  # of a head


@functools.cache
def variable_length_attention() -> Kernel | None:
    """``torch.nn.attention.varlen.varlen_attn``; ``None`` in a torch without it (before 2.11)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    # The first releases had another way to say causal, and no scale.
    return varlen_attn if _takes(varlen_attn, "scale", "window_size") else None


def kernel_for(device: torch.device, kind: torch.dtype, size: int) -> Kernel | None:
    """The kernel for heads of ``size`` in ``kind``; ``None`` where there is none.

    It wants half precision, and a GPU of Ampere or later.
    """
    if device.type != "cuda" or kind not in HALF or size not in _SIZES:
        return None
    is_new = torch.cuda.get_device_capability(device) >= (8, 0)
    return variable_length_attention() if is_new else None


def cache_kernel_for(device: torch.device, kind: torch.dtype, config: Any) -> Kernel | None:
    """`kernel_for`, where it can stop at the used part of a row and every layer sees all of it."""
    kernel = None if has_windows(config) else kernel_for(device, kind, head_size(config))
    return kernel if kernel and _takes(kernel, "seqused_k", "enable_gqa") else None


def head_size(config: Any) -> int:
    """Numbers in a query of a head."""
    size = getattr(config, "head_dim", None)
    return int(size or config.hidden_size // config.num_attention_heads)


def has_windows(config: Any) -> bool:
    """Whether some layers of a model see less than all that came before."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return kinds != {"full_attention"} or bool(getattr(config, "sliding_window", None))


def grouped(kernel: Kernel, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Keys and values as ``kernel`` takes them beside more query heads, all [T, heads, size]."""
    copies = query.shape[1] // key.shape[1]
    if copies == 1 or _takes(kernel, "enable_gqa"):
        return key, value
    return key.repeat_interleave(copies, dim=1), value.repeat_interleave(copies, dim=1)


def attend_used(
    kernel: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    used: Tensor,
    longest: int,
    scaling: float | None,
) -> Tensor:
    """Causal attention in which a row reads its own keys and none behind them.

    Args:
        kernel: `cache_kernel_for`'s.
        query: [b, heads, q, size], the last tokens of each row.
        key: [b, key-value heads, n, size] in memory as [b, n, key-value heads, size].
        value: Like ``key``.
        used: [b] int32, the tokens of each row, those of the query among them.
        longest: No row uses more.
        scaling: Of the scores; ``1 / sqrt(size)`` when ``None``.

    Returns:
        [b, q, heads, size].
    """
    rows, _, width, _ = query.shape
    starts = torch.arange(rows + 1, dtype=torch.int32, device=query.device)
    q, k, v = (x.transpose(1, 2).flatten(0, 1).to(key.dtype) for x in (query, key, value))
    attended: Tensor = kernel(
        q,
        k,
        v,
        starts * width,
        starts * key.shape[2],
        width,
        longest,
        scale=scaling,
        window_size=(-1, 0),  # causal: the last query sees all that is used
        enable_gqa=True,
        seqused_k=used,
    )
    return attended.reshape(rows, width, *attended.shape[1:])


def _takes(kernel: Kernel, *names: str) -> bool:
    return set(names) <= set(inspect.signature(kernel).parameters)
