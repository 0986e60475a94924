"""Which cache a model is sampled over: a block of our own where that is right, or transformers'."""

from __future__ import annotations

import logging
from typing import Literal

from torch import nn

from aem_lightning.rollout.plain_model import PlainModel
from aem_lightning.rollout.slot_model import SlotModel

logger = logging.getLogger(__name__)

CacheKind = Literal["slots", "plain", "auto"]


def pick_model(
    cache: CacheKind,
    causal_lm: nn.Module,
    earlier: SlotModel | PlainModel | None,
    shape: tuple[int, int, int],
) -> SlotModel | PlainModel:
    """The forward pass for ``causal_lm``.

    Args:
        cache: ``auto`` takes `SlotModel` unless that refuses the model; the reason is said once.
        causal_lm: The model.
        earlier: What ran before; of the same model, what can be kept is.
        shape: Slots, longest row and bucket of a `SlotModel`.

    Raises:
        ValueError: ``cache="slots"``, and the model is of a kind that would be computed wrongly.
    """
    plain = earlier if isinstance(earlier, PlainModel) else None
    if cache == "plain" or (cache == "auto" and plain and plain.causal_lm is causal_lm):
        return PlainModel(causal_lm, plain)
    try:
        model = SlotModel(causal_lm, *shape)
    except ValueError as error:
        if cache == "slots":
            raise
        why, _, _ = str(error).partition(". Type ")
        logger.warning("engine=auto samples over transformers' own caches, slower: %s", why)
        return PlainModel(causal_lm)
    if isinstance(earlier, SlotModel):
        model.inherit(earlier)  # nothing in its cache is read again: no slot has ids
    return model
