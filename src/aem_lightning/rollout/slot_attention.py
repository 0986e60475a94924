"""Attention over the slot cache, and its masks, as transformers asks for them."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from aem_lightning.rollout.varlen import attend_used

if TYPE_CHECKING:
    from aem_lightning.rollout.slot_model import SlotModel


@dataclass(frozen=True)
class Pass:
    """What masks and attention of a forward pass over slots are made for."""

    positions: Tensor
    read: int
    model: SlotModel


PASS: ContextVar[Pass] = ContextVar("pass")


def slot_mask(
    *, mask_function: Callable[..., Tensor], use_vmap: bool, **kwargs: object
) -> Tensor | None:
    """The mask of a kind of layer, by its own rule: full, sliding or chunked attention.

    transformers asks for it; the rule speaks of positions, which lie in the slots from 0 on.
    """
    from transformers import masking_utils

    causal: object = masking_utils.causal_mask_function
    if use_vmap:  # a rule that is no function of indices
        raise ValueError("its attention has a mask of its own kind")
    wanted = PASS.get()
    rule = None if mask_function is causal else mask_function
    return wanted.model.mask(wanted.positions, wanted.read, rule)


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention that never repeats keys and values over the query heads that share them.

    The query heads of a key-value head are laid one after the other along the query axis: they see
    the same keys under the same mask. Repeating instead would copy the cache a few times over in
    every layer and step.
    """
    if softcap is not None or s_aux is not None:
        raise ValueError("its attention has a soft cap or sinks")
    under_way = PASS.get()
    kernel, used = under_way.model.kernel, under_way.model.cache.used
    if attention_mask is None:
        if kernel is None or used is None:
            raise ValueError("its attention has no mask")
        return attend_used(kernel, query, key, value, used, under_way.read, scaling), None
    batch, heads, width, size = query.shape
    shared = heads // key.shape[1]
    folded = query.reshape(batch, key.shape[1], shared * width, size)
    if attention_mask.shape[2] != shared * width:  # of other layers than this
        attention_mask = attention_mask[:, :, :width].repeat(1, 1, shared, 1)
    mask = attention_mask.to(query.dtype)
    parts = [
        (folded[rows], key[rows, :, :read], value[rows, :, :read], mask[rows, :, :, :read])
        for rows, read in under_way.model.cache.pieces
    ] or [(folded, key, value, mask)]
    outputs = [
        scaled_dot_product_attention(q, k, v, attn_mask=m, scale=scaling) for q, k, v, m in parts
    ]
    attended = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return attended.reshape(batch, heads, width, -1).transpose(1, 2).contiguous(), None
