"""Attention over a packed row: sequences laid one after the other, each blind to the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import groupby
from typing import Any, get_args
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function as _causal

from aem_lightning.functional.logprob import HALF
from aem_lightning.modules.settings import Packing
from aem_lightning.rollout.head import decoder_of, probe_rows
from aem_lightning.rollout.sampling import evaluated
from aem_lightning.rollout.slot_cache import compute_dtype
from aem_lightning.rollout.varlen import Kernel, grouped, has_windows, head_size, kernel_for

PACKED = "aem_packed"
CAUSAL: object = _causal
_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
# Models of which it is known that packed rows come out right.
TRIED: WeakSet[nn.Module] = WeakSet()


@dataclass(frozen=True)
class Segments:
    """Where the sequences of a packed row of T tokens begin and end.

    Attributes:
        lengths: Tokens of each sequence; their sum is T.
        offsets: [n + 1] int32, 0 and the running sum of ``lengths``, on the row's device.
        positions: [1, T] position of each token in its own sequence.
    """

    lengths: tuple[int, ...]
    offsets: Tensor
    positions: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Segments:
        sizes = torch.tensor(lengths, dtype=torch.int32)
        offsets = torch.nn.functional.pad(sizes.cumsum(0, dtype=torch.int32), (1, 0))
        starts = offsets[:-1].repeat_interleave(sizes)
        positions = torch.arange(int(offsets[-1])) - starts
        return cls(tuple(lengths), offsets.to(device), positions[None].to(device))

    def causal_mask(self) -> Tensor:
        """What no mask stands for: each token sees itself and what is to its left, [l, l] bool."""
        longest = max(self.lengths)
        return torch.ones(longest, longest, dtype=torch.bool, device=self.offsets.device).tril()


# The packed row under way, while its masks are made.
_SEGMENTS: ContextVar[Segments | None] = ContextVar("segments", default=None)


def packed_hidden(model: PreTrainedModel, input_ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """Last hidden states [1, T, d] of a packed row [1, T] of sequences of these ``lengths``."""
    use_packed_attention(model)
    segments = Segments.of(lengths, input_ids.device)
    before = _SEGMENTS.set(segments)
    try:
        # Without a mask, transformers would find the sequences by their positions and make a dense
        # [T, T] one.
        hidden: Tensor = decoder_of(model)(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            position_ids=segments.positions,
            use_cache=False,
            segments=segments,
        ).last_hidden_state
    finally:
        _SEGMENTS.reset(before)
    return hidden


def is_packed(packing: Packing, model: PreTrainedModel) -> bool:
    """Whether the rows of a micro-batch of ``model`` go through it packed rather than padded.

    ``auto`` packs wherever one attention call does for all rows, or where calls cost next to
    nothing: on a GPU in half precision, and on a CPU.

    Raises:
        ValueError: An unknown word, or ``packed`` for a model that cannot be.
    """
    if packing not in get_args(Packing):
        allowed = ", ".join(f"packing={choice}" for choice in get_args(Packing))
        raise ValueError(f"packing={packing!r} is unknown; allowed: {allowed}.")
    obstacle = None if packing == "padded" else packing_obstacle(model)
    if packing == "packed" and obstacle is not None:
        raise ValueError(f"This model cannot be packed: {obstacle}. Type packing=padded.")
    if packing == "auto" and obstacle is None and model.device.type != "cpu":
        config = decoder_of(model).config
        if has_windows(config):  # those layers would take a call for each row
            return False
        kind = compute_dtype(model.device, model.dtype)
        return kernel_for(model.device, kind, head_size(config)) is not None
    return packing != "padded" and obstacle is None


def packing_obstacle(model: PreTrainedModel) -> str | None:
    """Why ``model`` cannot attend over a packed row; ``None`` when it can, which is tried."""
    config = decoder_of(model).config  # of a model with other parts too, that of its text
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= _KINDS:
        return f"its layers are {sorted(kinds)}, and packing needs attention"
    if config._attn_implementation not in ("sdpa", PACKED):
        return f"its attention is {config._attn_implementation!r}, and packing needs 'sdpa'"
    if not model._supports_attention_backend:
        return f"{type(model).__name__} has an attention of its own"
    return None if model in TRIED else _trial(model)


def _trial(model: PreTrainedModel) -> str | None:
    """What is wrong with a packed row of two short sequences, against the model on each alone."""
    decoder = decoder_of(model)
    before = decoder.config._attn_implementation
    try:
        with evaluated(model):
            rows = [torch.tensor([ids], device=model.device) for ids in probe_rows(model, 2, 72)]
            alone = [decoder(input_ids=row, use_cache=False).last_hidden_state for row in rows]
            lengths = [row.shape[1] for row in rows]
            own = torch.cat(alone, 1).float()
            packed = packed_hidden(model, torch.cat(rows, 1), lengths).float()
    except (RuntimeError, TypeError, ValueError) as error:  # whatever a family makes of its mask
        return f"{type(model).__name__} does not take it ({error})".partition("\n")[0]
    finally:
        decoder.config._attn_implementation = before
    off = float((packed - own).abs().mean() / own.abs().mean())
    # Rounding is a ten-thousandth of this, in half precision a hundredth; a neighbour that is seen,
    # or a window that is not kept, is a tenth and more.
    if off <= (0.05 if compute_dtype(model.device, model.dtype) in HALF else 1e-3):
        return None
    return f"{type(model).__name__} comes out otherwise there: its states are off by {off:.0%}"


def use_packed_attention(model: PreTrainedModel) -> None:
    """Let ``model`` attend over packed rows; any other batch is attended to as before.

    The setting stays: gradient checkpointing runs the layers again in the backward pass, long after
    the call that packed.
    """
    config = decoder_of(model).config
    if config._attn_implementation != PACKED:
        AttentionInterface.register(PACKED, packed_attention)
        AttentionMaskInterface.register(PACKED, _packed_mask)
        config._attn_implementation = PACKED


def _packed_mask(
    *, mask_function: Callable[..., Tensor], use_vmap: bool = False, **options: Any
) -> Tensor | None:
    """A layer's mask: over any batch transformers' own, over a packed row that of its longest.

    [1, 1, l, l], of which any other sequence's is a corner; ``None`` where it is just causal.
    """
    segments = _SEGMENTS.get()
    if segments is None:
        dense: Callable[..., Tensor | None] = AttentionMaskInterface()["sdpa"]
        return dense(mask_function=mask_function, use_vmap=use_vmap, **options)
    if use_vmap:
        raise ValueError("its mask is no function of positions")
    if mask_function is CAUSAL:
        return None
    index = torch.arange(max(segments.lengths), device=segments.offsets.device)
    zero = index.new_zeros(1)
    sees = mask_function(zero, zero, index[:, None], index)
    return None if torch.equal(sees, segments.causal_mask()) else sees[None, None]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Causal attention inside each segment; without ``segments``, transformers' own over the batch.

    Args:
        module: The attention layer.
        query: [1, heads, T, size].
        key: [1, key-value heads, T, size]; query heads share them in equal parts.
        value: Like ``key``.
        attention_mask: As `_packed_mask` made it.
        segments: The sequences of the packed row.
        scaling: Of the scores; ``1 / sqrt(size)`` when ``None``.
        **kwargs: The rest of what transformers hands to an attention function.

    Returns:
        [1, T, heads, size], and no weights.
    """
    if segments is None:
        plain: Callable[..., tuple[Tensor, Tensor | None]] = AttentionInterface()["sdpa"]
        return plain(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError("its attention has a soft cap or sinks")
    kind = compute_dtype(query.device, value.dtype)
    if kind in HALF:
        # Under autocast, rotary embeddings leave float32 queries and keys beside half values.
        query, key, value = query.to(kind), key.to(kind), value.to(kind)
    varlen = kernel_for(query.device, kind, query.shape[-1])
    if varlen is not None and attention_mask is None:
        return attend_in_one_kernel(varlen, query, key, value, segments, scaling), None
    return attend_by_segment(query, key, value, segments, scaling, attention_mask), None


def attend_by_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None,
    mask: Tensor | None = None,
) -> Tensor:
    """One attention call for each run of sequences of equal length, [1, T, heads, size].

    The ``mask`` [1, 1, l, l] is that of the longest sequence; ``None`` is causal.
    """
    pieces, start = [], 0
    shared = query.shape[1] != key.shape[1]
    for length, run in groupby(segments.lengths):
        count = sum(1 for _ in run)
        end = start + count * length
        # [1, h, n * l, s] -> [n, h, l, s]
        q, k, v = (
            x[0, :, start:end].unflatten(1, (count, length)).transpose(0, 1)
            for x in (query, key, value)
        )
        attended = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if mask is None else mask[..., :length, :length],
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=shared,
        )
        pieces.append(attended.transpose(1, 2).flatten(0, 1))
        start = end
    return torch.cat(pieces)[None]


def attend_in_one_kernel(
    varlen: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None,
) -> Tensor:
    """All sequences in one call of FlashAttention, [1, T, heads, size]; half precision on CUDA."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, h, s]
    k, v = grouped(varlen, q, k, v)
    options = {} if q.shape[1] == k.shape[1] else {"enable_gqa": True}
    longest = max(segments.lengths)
    attended: Tensor = varlen(
        q,
        k,
        v,
        segments.offsets,
        segments.offsets,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),  # causal: nothing to the right
        **options,
    )
    return attended[None]
