"""A HF causal LM that appends token chunks to the rows of a slot cache and says what comes next."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from aem_lightning.functional.logprob import HALF
from aem_lightning.rollout.adapters import AdapterCopies
from aem_lightning.rollout.cuda_graphs import DecodeGraphs
from aem_lightning.rollout.head import Head, probe_rows
from aem_lightning.rollout.padding import (
    Piece,
    doubled,
    filled,
    head_of,
    pieces_of,
    spread,
    widened,
)
from aem_lightning.rollout.sampling import evaluated
from aem_lightning.rollout.slot_attention import PASS, Pass, slot_attention, slot_mask
from aem_lightning.rollout.slot_cache import (
    SlotCache,
    block_shape,
    bytes_of_token,
    check_room,
    compute_dtype,
    free_bytes,
)
from aem_lightning.rollout.varlen import cache_kernel_for

logger = logging.getLogger(__name__)

_ATTENTION = "aem_slots"
# A wave of prompts is padded to its longest. Its padding may reach a quarter of its tokens, or this
# many tokens: below that a second forward pass costs more than the padding.
_FREE_PADDING = 256
_WAVE_TOKENS = 8192
# Models of which it is known that their logits come out right.
TRIED: WeakSet[nn.Module] = WeakSet()
# Models that the kernel for rows of unlike lengths does not do.
WITHOUT_KERNEL: WeakSet[nn.Module] = WeakSet()


class SlotModel:
    """The forward pass of the ``hf`` engine: body and head of a causal LM over a slot cache.

    Weights are used as they are, adapters unmerged: of a HF ``*ForCausalLM``, injected or wrapped
    by PEFT or neither. The numbers are `SlotEngine`'s.

    Raises:
        ValueError: The model's attention, cache or head is of a kind that is not done here, by the
            logits of two short rows.
    """

    def __init__(
        self, causal_lm: nn.Module, slots: int, max_length: int, bucket: int, *, trial: bool = False
    ) -> None:
        # A PEFT wrapper hands out the model inside, whose layers still carry the adapters.
        base: Any = getattr(causal_lm, "get_base_model", lambda: causal_lm)()
        self.causal_lm = causal_lm
        self._base = base
        self._head = Head(base)
        self._config = self._head.decoder.config  # what its layers read
        self._max_length = max_length
        self._bucket = bucket
        weight = base.get_input_embeddings().weight
        self.device: torch.device = weight.device
        self._kind = compute_dtype(weight.device, weight.dtype)
        kernel = cache_kernel_for(self.device, self._kind, self._config)
        self.kernel = None if causal_lm in WITHOUT_KERNEL else kernel
        self.cache = SlotCache(slots, max_length, tokens_first=self.kernel is not None)
        # The mask's row of a query at position p begins max_length - 1 - p further on: p + 1 zeros
        # (what it sees), then -inf.
        band = torch.zeros(2 * max_length, dtype=self._kind, device=self.device)
        band[max_length:] = -torch.inf
        self._band = band
        self._shared = _query_heads_per_key(base)
        parameters = list(causal_lm.parameters())
        self._addresses = [parameter.data_ptr() for parameter in parameters]
        # Kept, the smallest weight's memory is not given out again: a model that went to the CPU
        # and came back, as between two stages of a run, differs here even if all else fell back
        # into place. Its buffers and 4-bit scales, which graphs read too, need not have.
        self._held = min(parameters, key=torch.Tensor.numel).data
        self.graphs: DecodeGraphs | None = None
        self.adapters = AdapterCopies(causal_lm, self._kind)
        self.few_shapes = self.device.type == "cuda"
        if not trial and causal_lm not in TRIED:
            self._try()
            TRIED.add(causal_lm)

    def inherit(self, earlier: SlotModel) -> None:
        """Take over the cache of an earlier model, and its graphs, as far as they fit this one.

        The block of keys and values is big; it stays. Graphs hold addresses: those of the cache, of
        the band of masks, and of the weights, which an optimizer changes in place.
        """
        if self.causal_lm is not earlier.causal_lm or self.device != earlier.device:
            return
        self._head = earlier._head
        if self._kind == earlier._kind:
            self.cache = earlier.cache
            self.kernel = earlier.kernel
            if self._addresses == earlier._addresses and earlier.graphs is not None:
                self.graphs = earlier.graphs
                self._band = earlier._band
                self.adapters = earlier.adapters

    def prepare(self, *, graphs: bool) -> None:
        """Take the adapters' present weights; be ready to capture ``graphs``, on a GPU.

        Raises:
            MemoryError: The first keys and values, not yet there, do not fit beside the model.
        """
        self.cache.forget()
        if self.graphs is None and graphs and self.device.type == "cuda":
            self.graphs = DecodeGraphs(self.cache.slots, self._max_length - 1)
        self.adapters.refresh()
        free = free_bytes(self.device)
        if free is None or self.cache.nbytes:
            return
        slots = self.cache.slots
        rows, tokens = block_shape(slots, 0, slots, self._max_length)
        check_room(bytes_of_token(self._config, self._kind), rows, tokens, free)

    def drop_kernel(self, error: Exception) -> None:
        """From now on every row of a step reads as far as the longest, under a mask."""
        told = "engine=hf: attention under a mask, the kernel for unlike lengths will not do (%s)"
        logger.warning(told, str(error).partition("\n")[0])
        WITHOUT_KERNEL.add(self.causal_lm)
        self.kernel = None

    def _try(self) -> None:
        """Raise unless `_trial` is passed, if need be without the kernel."""
        try:
            self._trial()
        except ValueError as error:
            if self.kernel is None:
                raise
            self.drop_kernel(error)
            self._trial()

    def _trial(self) -> None:
        """Raise unless two short rows, each fed in two pieces, get the model's own logits."""
        rows = probe_rows(self._base, 2, self._max_length - 1)
        cuts = [len(rows[0]) // 2, 1]
        heads = [row[:cut] for row, cut in zip(rows, cuts, strict=True)]
        rests = [row[cut:] for row, cut in zip(rows, cuts, strict=True)]
        size = len(rows[0]) + 1
        try:
            with evaluated(self.causal_lm):
                own = [
                    self._base(input_ids=torch.tensor([row], device=self.device), use_cache=False)
                    for row in rows
                ]
            trial = SlotModel(self.causal_lm, len(rows), size, self._bucket, trial=True)
            with trial.sampling_mode():
                trial.forward([0, 1], [0, 0], heads)
                found = trial.forward([0, 1], cuts, rests)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a family does that none before it did
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise ValueError(_refusal(self._base, reason)) from error
        wanted = torch.stack([output.logits[0, -1].float() for output in own])
        gap = (found.log_softmax(-1) - wanted.log_softmax(-1)).abs()
        half = self._kind in HALF
        # Half precision rounds logits by hundredths; another mask or scale is off by far more.
        if (figure := float(gap.mean() if half else gap.max())) > (0.25 if half else 1e-3):
            reason = f"its log-probabilities come out {figure:.2g} nats off the model's own"
            raise ValueError(_refusal(self._base, reason))

    @contextmanager
    def sampling_mode(self) -> Iterator[None]:
        """Evaluation mode, in which attention is that of the slots."""
        # heavy: only where a model is there anyway
        from transformers import AttentionInterface, AttentionMaskInterface

        attention = self._config._attn_implementation
        AttentionInterface.register(_ATTENTION, slot_attention)
        AttentionMaskInterface.register(_ATTENTION, slot_mask)
        with evaluated(self.causal_lm), self.adapters.in_place():
            self._config._attn_implementation = _ATTENTION
            try:
                yield
            finally:
                self._config._attn_implementation = attention

    def forward(
        self, rows: Sequence[int], starts: Sequence[int], chunks: Sequence[list[int]]
    ) -> Tensor:
        """Logits after the last token of the chunk that each row is appended, [b, V] float32.

        The ``rows`` of the cache ascend and hold ``starts`` tokens; no chunk is empty.
        """
        counts = [len(chunk) for chunk in chunks]
        width = max(counts)
        if self.few_shapes and width > 1 and (cut := head_of(len(rows), width, self.cache.slots)):
            parts = [
                self.forward(rows[part], starts[part], chunks[part])
                for part in (slice(cut), slice(cut, None))
            ]
            return torch.cat(parts)
        longest = max(start + count for start, count in zip(starts, counts, strict=True))
        self.cache.fit(rows[-1] + 1, longest)
        if width == 1 and self.graphs is not None:
            tokens = [chunk[0] for chunk in chunks]
            logits = self.graphs.step(self, rows, starts, tokens, self._read(longest))
            if logits is not None:
                return logits
        own, pieces, read = list(rows), list[Piece](), self._read(longest)
        if self.few_shapes:
            # What the others of a wave write goes into the bin, and what they read nobody sees.
            rows = filled(rows, self.cache.slots)
            self.cache.fit(rows[-1] + 1, longest)
            starts = spread(rows, own, starts, self.cache.tokens - 1)
            chunks = spread(rows, own, chunks, [0])
            counts = [len(chunk) for chunk in chunks]
            width = widened(width) if width > 1 else 1
            read = min(self.cache.tokens, doubled(read, self._bucket))
        else:
            pieces = pieces_of([start + width for start in starts], read)
        padded = [chunk + [0] * (width - len(chunk)) for chunk in chunks]
        start = torch.tensor(starts, device=self.device)
        positions = start[:, None] + torch.arange(width, device=self.device)
        in_bin, stops = self.cache.tokens - 1, False
        if self.kernel is not None:
            end = max((start for start in starts if start < in_bin), default=0) + width
            stops = end <= self.cache.tokens  # else some padding would lie behind the end of a row
            read = max(read, end) if stops else read
        self.cache.aim(rows, positions.clamp(max=in_bin), read, pieces, stops=stops)
        ids = torch.tensor(padded, device=self.device)
        last = torch.tensor(counts, device=self.device) - 1
        logits = self._run(ids, positions, last, read)
        if len(own) == len(rows):
            return logits
        return logits[torch.tensor([rows.index(row) for row in own], device=self.device)]

    def _read(self, tokens: int) -> int:
        """Keys that a query reads which may look at the first ``tokens``."""
        return min(self.cache.tokens, -(-tokens // self._bucket) * self._bucket)

    def decode(self, tokens: Tensor, positions: Tensor, read: int) -> Tensor:
        """Append a token [b] to each of the first b rows; next-token logits [b, V], float32.

        Everything that changes from step to step comes in by the two tensors: this can be captured.
        """
        stops = self.kernel is not None
        self.cache.aim_first(len(tokens), positions[:, None], read, stops=stops)
        return self._run(tokens[:, None], positions[:, None], torch.zeros_like(tokens), read)

    def _run(self, ids: Tensor, positions: Tensor, last: Tensor, read: int) -> Tensor:
        """Logits after position ``last`` [b] of every row of ``ids`` [b, q]."""
        where = PASS.set(Pass(positions.clamp(max=self._max_length - 1), read, self))
        try:
            hidden = self._head.decoder(
                input_ids=ids, position_ids=positions, past_key_values=self.cache, use_cache=True
            ).last_hidden_state
            rows = torch.arange(len(ids), device=self.device)
            return self._head.logits(hidden[rows, last]).float()  # it may make masks once more
        finally:
            PASS.reset(where)

    def mask(
        self, positions: Tensor, read: int, sees: Callable[..., Tensor] | None
    ) -> Tensor | None:
        """What queries at ``positions`` [b, q] see of the first ``read`` keys, [b, 1, q', read].

        As it is added to the scores, with a row for every folded query (`slot_attention`). Made
        of True and False, or without the fold, it would be made anew in every layer.

        Args:
            positions: Of the queries, in their episodes.
            read: A number of keys.
            sees: transformers' function of the layer, from row, head, query and key; ``None`` for
                plain causal attention.

        Returns:
            ``None`` where attention stops at the end of every row by itself.
        """
        if sees is None and self.cache.used is not None:
            return None
        if sees is None:
            queries = positions.repeat(1, self._shared)
            return self._band.unfold(0, read, 1)[self._max_length - 1 - queries][:, None]
        rows = torch.arange(len(positions), device=self.device)[:, None, None, None]
        keys = torch.arange(read, device=self.device)
        allowed = sees(rows, rows.new_zeros(1), positions[:, None, :, None], keys)
        shape = (len(positions), 1, positions.shape[1], read)
        hidden = torch.zeros(shape, dtype=self._kind, device=self.device)
        return hidden.masked_fill_(~allowed, -torch.inf).repeat(1, 1, self._shared, 1)


def waves(lengths: dict[int, int]) -> list[list[int]]:
    """Rows by ``lengths`` in batches of similar length, so that their padding is bounded.

    The longest batch comes first; the rows of each ascend.
    """
    batches: list[list[int]] = []
    longest = total = 0
    for row in sorted(lengths, key=lambda candidate: (-lengths[candidate], candidate)):
        length = lengths[row]
        padded = longest * (len(batches[-1]) + 1) if batches else 0
        padding = padded - total - length
        fits = padded <= _WAVE_TOKENS and padding <= max(_FREE_PADDING, padded // 4)
        if batches and fits:
            batches[-1].append(row)
            total += length
        else:
            batches.append([row])
            longest = total = length
    return [sorted(wave) for wave in batches]


def _refusal(base: Any, reason: str) -> str:
    return (
        f"engine=hf cannot run {type(base).__name__}: {reason}. Type engine=auto, which runs it on "
        "its own cache, or engine=vllm"
    )


def _query_heads_per_key(base: Any) -> int:
    """How many query heads share a key-value head in most layers; masks are made for it."""
    heads = getattr(base.config, "num_attention_heads", None)
    keys = getattr(base.config, "num_key_value_heads", None)
    known = isinstance(heads, int) and isinstance(keys, int) and base._supports_attention_backend
    return heads // keys if known and keys else 1
