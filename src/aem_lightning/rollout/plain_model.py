"""Any HF causal LM over the cache that transformers makes for it: slower, and right for all kinds.

Recurrent and linear attention, attention sinks, soft-capped scores, chunks, windows and shared keys
are computed by the model's own code, which gets a prompt row by row and then a token a step for
all rows at once. What of that a model does rightly is measured on a few tokens before the first
request: whether its cache can be appended more than a token, whether rows of different lengths can
share a step (padded on the left), and whether there is a cache at all. Where not, it is fed token
by token, row by row, or whole; slower again, and as right.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aem_lightning.rollout.plain_cache import Part, PlainCache, has_tokens, join
from aem_lightning.rollout.sampling import evaluated
from aem_lightning.rollout.slot_cache import compute_dtype

logger = logging.getLogger(__name__)

# What outputs and arguments call a cache: of most families, of Mamba's and xLSTM, of RWKV.
_CACHES = ("past_key_values", "cache_params", "state")
# Tokens that are measured on, and those that are fed at first; how far off logits may be, as a
# share of how far tokens move them, in float32 and in half precision.
_TOKENS, _FEW, _FULL, _HALF = 16, 7, 1e-4, 0.1


@dataclass(frozen=True, slots=True)
class Ways:
    """What a model's cache does rightly.

    Attributes:
        name: What its argument is called; ``None``: there is none, or it is not to be trusted.
        appends: It takes more than one token at a time.
        joins: Rows of different lengths can be one batch.
    """

    name: str | None
    appends: bool
    joins: bool


class PlainModel:
    """The forward pass of ``engine=plain``; in the place of a `SlotModel`.

    Args:
        causal_lm: A HF ``*ForCausalLM``, injected or wrapped by PEFT or neither.
        earlier: What this engine ran before; of the same model, it need not be measured again.
    """

    def __init__(self, causal_lm: nn.Module, earlier: PlainModel | None = None) -> None:
        self.causal_lm = causal_lm
        # A PEFT wrapper hands out the model inside, whose layers still carry the adapters.
        get: Any = getattr(causal_lm, "get_base_model", lambda: causal_lm)
        self._base: Any = get()
        self._takes = inspect.signature(self._base.forward).parameters
        self.device: torch.device = self._base.get_input_embeddings().weight.device
        self._ways = Ways(None, appends=False, joins=False)
        blank: Any = None
        if earlier is not None and earlier.causal_lm is causal_lm:
            self._ways, blank = earlier._ways, earlier.cache.blank
        else:
            with self.sampling_mode():
                self._ways, blank = self._measure()
        self.cache: PlainCache = PlainCache(blank)

    @contextmanager
    def sampling_mode(self) -> Iterator[None]:
        """Evaluation mode without gradients."""
        with evaluated(self.causal_lm):
            yield

    def forward(
        self, rows: Sequence[int], starts: Sequence[int], chunks: Sequence[list[int]]
    ) -> Tensor:
        """Logits after the last token of the chunk that each row is appended, [b, V] float32.

        The ``rows`` keep their first ``starts`` tokens; no chunk is empty.
        """
        for row, start in zip(rows, starts, strict=True):
            self.cache.cut(row, start)
        if self._ways.joins and min(starts) > 0 and all(len(chunk) == 1 for chunk in chunks):
            ids = torch.tensor(chunks, device=self.device)
            return self._feed(ids, self.cache.together(rows))[1]
        logits = []
        for row, chunk in zip(rows, chunks, strict=True):
            part, last = self._append(chunk, self.cache.alone(row))
            self.cache.set(row, part)
            logits.append(last)
        return torch.cat(logits)

    def _append(self, chunk: list[int], part: Part | None) -> tuple[Part, Tensor]:
        """Feed a row a chunk, as it takes it."""
        ids = torch.tensor([chunk], device=self.device)
        whole = part is None or self._ways.appends
        for piece in [ids] if whole else ids.split(1, dim=1):
            part, logits = self._feed(piece, part)
        assert part is not None
        return part, logits

    def _feed(self, ids: Tensor, part: Part | None) -> tuple[Part, Tensor]:
        """Feed the rows of ``part`` ids [b, q]; it, changed, and the last logits [b, V] float32."""
        part, name = part or Part(None, [0] * len(ids)), self._ways.name
        given: dict[str, Any] = {"input_ids": ids, "use_cache": name is not None}
        if name is None:
            given["input_ids"] = ids if part.cache is None else torch.cat([part.cache, ids], dim=1)
        elif part.cache is not None:
            given[name] = part.cache
        given |= self._places(part, given["input_ids"].shape[1]) | {"logits_to_keep": 1}
        output = self._base(**{key: given[key] for key in given if key in self._takes})
        part.cache = given["input_ids"] if name is None else getattr(output, name)
        part.lengths = [length + ids.shape[1] for length in part.lengths]
        return part, output.logits[:, -1].float()

    def _places(self, part: Part, count: int) -> dict[str, Any]:
        """Positions of ``count`` tokens a row, and the mask of rows that are padded on the left."""
        if isinstance(part.cache, Tensor):
            return {}
        held = torch.tensor(part.lengths, device=self.device)[:, None]
        positions = held + torch.arange(count, device=self.device)
        longest = max(part.lengths)
        if min(part.lengths) == longest or not has_tokens(part.cache):
            return {"position_ids": positions}
        there = torch.arange(longest + count, device=self.device) >= longest - held
        return {"position_ids": positions, "attention_mask": there.long()}

    def _measure(self) -> tuple[Ways, Any]:
        """What the model's cache does rightly, and a cache of one token."""
        ids = probe(self._base, _TOKENS)
        whole, early = (self._feed(ids[:, :end], None)[1] for end in (_TOKENS, _FEW))

        def works(ways: Ways, feed: Callable[[], Tensor]) -> bool:
            self._ways = ways
            try:
                return not off(self._base, feed(), whole, early) > 1  # not finite: told when drawn
            except Exception as error:  # a family may say in any way what it cannot do
                logger.debug("%s: %r", ways, error)
                return False

        def in_parts(*sizes: int) -> Tensor:
            part, logits = None, whole
            for piece in ids.split(sizes, dim=1):
                part, logits = self._feed(piece, part)
            return logits

        def together() -> Tensor:
            parts = [self._feed(ids[:, start:-1], None)[0] for start in (0, 3)]
            alone = [self._feed(ids[:, -1:], copy.deepcopy(part))[1] for part in parts]
            joined = self._feed(ids[:, -1:].expand(2, 1), join(parts))[1]
            return joined - torch.cat(alone) + whole

        steps = [_FEW] + [1] * (_TOKENS - _FEW)
        for name in (name for name in _CACHES if name in self._takes):
            if not works(Ways(name, True, False), lambda: in_parts(*steps)):
                continue
            appends = works(Ways(name, True, False), lambda: in_parts(_FEW, _TOKENS - _FEW))
            joins = works(Ways(name, appends, True), together)
            self._ways = Ways(name, appends, joins)
            return self._ways, self._feed(ids[:, :1], None)[0].cache
        return Ways(None, appends=False, joins=False), None


def probe(base: Any, count: int) -> Tensor:
    """Tokens from all over a causal LM's vocabulary, [1, count]."""
    weight: Tensor = base.get_input_embeddings().weight
    return (torch.arange(count, device=weight.device) * 7919 + 1)[None] % len(weight)


def off(base: Any, found: Tensor, own: Tensor, early: Tensor) -> float:
    """How far logits ``found`` are from a causal LM's ``own``, as a share of what is allowed.

    That goes by how far tokens move logits: ``early`` are those of some tokens before, all [n, V].
    In half precision, where roundings are large, it is about the mean in place of the largest.
    """
    weight: Tensor = base.get_input_embeddings().weight
    full = compute_dtype(weight.device, weight.dtype) == torch.float32
    full = full and torch.get_float32_matmul_precision() == "highest"
    gap, moved = (found - own).abs(), (own - early).abs().mean()
    return float(gap.amax() / (_FULL * moved) if full else gap.mean() / (_HALF * moved))
