"""Which cache a model is sampled over: a block of our own where that is right, or transformers'."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import nn

from aem_lightning.rollout.plain_model import PlainModel, off, probe
from aem_lightning.rollout.sampling import evaluated
from aem_lightning.rollout.slot_model import SlotModel

logger = logging.getLogger(__name__)

CacheKind = Literal["slots", "plain", "auto"]
# The check goes this far, and as far past a window of the model's, up to so many tokens.
_TOKENS, _FED, _MOST = 16, 3, 1024


def pick_model(
    cache: CacheKind,
    causal_lm: nn.Module,
    earlier: SlotModel | PlainModel | None,
    shape: tuple[int, int, int],
) -> SlotModel | PlainModel:
    """The forward pass for ``causal_lm``.

    Args:
        cache: ``auto`` takes `SlotModel` unless that refuses the model, or gives other logits than
            the model by itself on a few tokens; the reason is said once.
        causal_lm: The model.
        earlier: What ran before; of the same model, nothing is measured again, and what can be kept
            is.
        shape: Slots, longest row and bucket of a `SlotModel`.

    Raises:
        ValueError: ``cache="slots"``, and the model is of a kind that would be computed wrongly.
    """
    known = earlier is not None and earlier.causal_lm is causal_lm
    plain = earlier if isinstance(earlier, PlainModel) else None
    if cache == "plain" or (cache == "auto" and known and plain is not None):
        return PlainModel(causal_lm, plain)
    try:
        model = SlotModel(causal_lm, *shape)
        if isinstance(earlier, SlotModel):
            model.inherit(earlier)
        if cache == "auto" and not known:
            _check(model, longest=shape[1])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a family may say in any way that it is another
        if cache == "slots":
            raise
        logger.warning(
            "engine=auto: %s. Responses are sampled over transformers' own caches, which is slower "
            "(engine=plain)",
            error,
        )
        return PlainModel(causal_lm)
    return model


def _check(model: SlotModel, longest: int) -> None:
    """Raise unless ``model`` gives what its causal LM gives by itself, after each of three tokens.

    The first of them comes behind a prompt, the others are fed alone.
    """
    get: Any = getattr(model.causal_lm, "get_base_model", lambda: model.causal_lm)
    base = get()
    sizes = (
        getattr(base.config, name, None) for name in ("sliding_window", "attention_chunk_size")
    )
    window = max((size for size in sizes if isinstance(size, int) and size < _MOST), default=0)
    count = min(longest, window + _TOKENS)
    if count < 2 * _FED:
        return
    ids = probe(base, count)
    with evaluated(model.causal_lm):
        own = base(input_ids=ids, use_cache=False).logits[0].float()
    with model.sampling_mode():
        chunks = ids.split([count - _FED + 1, *[1] * (_FED - 1)], dim=1)
        starts = [0, *range(count - _FED + 1, count)]
        found = torch.cat(
            [
                model.forward([0], [at], part.tolist())
                for at, part in zip(starts, chunks, strict=True)
            ]
        )
    gap = off(base, found, own[-_FED:], own[:_FED])
    if gap > 1:  # of logits that are not finite, the engine says more
        raise ValueError(
            f"over slots, the logits of {type(base).__name__} are off by {gap:.0f} times what "
            "rounding explains"
        )
