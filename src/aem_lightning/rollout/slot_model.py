"""A HF causal LM that appends token chunks to the rows of a slot cache and says what comes next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from aem_lightning.functional.logprob import wide_product
from aem_lightning.rollout.adapters import AdapterCopies
from aem_lightning.rollout.cuda_graphs import DecodeGraphs
from aem_lightning.rollout.padding import doubled, filled, spread, widened
from aem_lightning.rollout.slot_cache import SlotCache, check_room, compute_dtype, free_bytes

_ATTENTION = "aem_slots"
# A wave of prompts is padded to its longest. Its padding may reach a quarter of its tokens, or this
# many tokens: below that a second forward pass costs more than the padding.
_FREE_PADDING = 256
_WAVE_TOKENS = 8192


class SlotModel:
    """The forward pass of the ``hf`` engine: body and head of a causal LM over a slot cache.

    Weights are used as they are, adapters unmerged: of a HF ``*ForCausalLM``, injected or wrapped
    by PEFT or neither. The numbers are `SlotEngine`'s.

    Raises:
        ValueError: The model's layers or head are of a kind that would be computed wrongly.
    """

    def __init__(self, causal_lm: nn.Module, slots: int, max_length: int, bucket: int) -> None:
        # A PEFT wrapper hands out the model inside, whose layers still carry the adapters.
        base: Any = getattr(causal_lm, "get_base_model", lambda: causal_lm)()
        _check_config(base.config)
        self.causal_lm = causal_lm
        self.cache = SlotCache(slots, max_length)
        self._config = base.config
        self._body = base.get_decoder()
        self._head = base.get_output_embeddings()
        self._max_length = max_length
        self._bucket = bucket
        weight = base.get_input_embeddings().weight
        self.device: torch.device = weight.device
        self._kind = compute_dtype(weight.device, weight.dtype)
        # The mask's row of a query at position p begins max_length - 1 - p further on: p + 1 zeros
        # (what it sees), then -inf.
        band = torch.zeros(2 * max_length, dtype=self._kind, device=self.device)
        band[max_length:] = -torch.inf
        self._band = band
        self._shared = _query_heads_per_key(base.config)
        parameters = list(causal_lm.parameters())
        self._addresses = [parameter.data_ptr() for parameter in parameters]
        # Kept, the smallest weight's memory is not given out again: a model that went to the CPU
        # and came back, as between two stages of a run, differs here even if all else fell back
        # into place. Its buffers and 4-bit scales, which graphs read too, need not have.
        self._held = min(parameters, key=torch.Tensor.numel).data
        self.graphs: DecodeGraphs | None = None
        self.adapters = AdapterCopies(causal_lm, self._kind)
        self.few_shapes = self.device.type == "cuda"

    def inherit(self, earlier: SlotModel) -> None:
        """Take over the cache of an earlier model, and its graphs, as far as they fit this one.

        The block of keys and values is big; it stays. Graphs hold addresses: those of the cache, of
        the band of masks, and of the weights, which an optimizer changes in place.
        """
        if self.causal_lm is not earlier.causal_lm or self.device != earlier.device:
            return
        if self._kind == earlier._kind:
            self.cache = earlier.cache
            if self._addresses == earlier._addresses and earlier.graphs is not None:
                self.graphs = earlier.graphs
                self._band = earlier._band
                self.adapters = earlier.adapters

    def prepare(self, *, graphs: bool) -> None:
        """Take the adapters' present weights; be ready to capture ``graphs``, on a GPU.

        Raises:
            MemoryError: The keys and values, not yet there, do not fit beside the model.
        """
        if self.graphs is None and graphs and self.device.type == "cuda":
            self.graphs = DecodeGraphs(self.cache.slots, self._max_length - 1)
        self.adapters.refresh()
        free = free_bytes(self.device)
        if free is None or self.cache.nbytes:
            return
        config, queries = self._config, self._config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or queries
        width = getattr(config, "head_dim", None) or config.hidden_size // queries
        token = 2 * config.num_hidden_layers * heads * width * self._kind.itemsize
        check_room(token, self.cache.slots, self._max_length, free)

    @contextmanager
    def sampling_mode(self) -> Iterator[None]:
        """Evaluation mode without gradients; every submodule's own mode comes back afterwards."""
        training = [module for module in self.causal_lm.modules() if module.training]
        attention = self._config._attn_implementation
        from transformers import AttentionInterface  # heavy: only where a model is there anyway

        AttentionInterface.register(_ATTENTION, _slot_attention)
        for module in training:
            module.training = False
        self._config._attn_implementation = _ATTENTION
        try:
            # A trainer may evaluate in inference mode; the cache outlives it and needs ordinary
            # tensors.
            with torch.inference_mode(False), torch.no_grad(), self.adapters.in_place():
                yield
        finally:
            self._config._attn_implementation = attention
            for module in training:
                module.training = True
            # Weights that autocast cast and cached here carry no gradient. Some releases of torch
            # would silently use them in a training pass of the same autocast region.
            torch.clear_autocast_cache()

    def forward(
        self, rows: Sequence[int], starts: Sequence[int], chunks: Sequence[list[int]]
    ) -> Tensor:
        """Logits after the last token of the chunk that each row is appended, [b, V] float32.

        The ``rows`` of the cache ascend and hold ``starts`` tokens; no chunk is empty.
        """
        counts = [len(chunk) for chunk in chunks]
        width = max(counts)
        longest = max(start + count for start, count in zip(starts, counts, strict=True))
        read = min(self._max_length, -(-longest // self._bucket) * self._bucket)
        if width == 1 and self.graphs is not None:
            tokens = [chunk[0] for chunk in chunks]
            logits = self.graphs.step(self, rows, starts, tokens, read)
            if logits is not None:
                return logits
        own = list(rows)
        if self.few_shapes:
            # What the others of a wave write goes into the bin, and what they read nobody sees.
            rows = filled(rows, self.cache.slots)
            starts = spread(rows, own, starts, self._max_length - 1)
            chunks = spread(rows, own, chunks, [0])
            counts = [len(chunk) for chunk in chunks]
            width = widened(width) if width > 1 else 1
            read = min(self._max_length, doubled(read, self._bucket))
        padded = [chunk + [0] * (width - len(chunk)) for chunk in chunks]
        start = torch.tensor(starts, device=self.device)
        positions = start[:, None] + torch.arange(width, device=self.device)
        self.cache.aim(rows, positions.clamp(max=self._max_length - 1), read)
        ids = torch.tensor(padded, device=self.device)
        last = torch.tensor(counts, device=self.device) - 1
        logits = self._run(ids, positions, last, read)
        if len(own) == len(rows):
            return logits
        return logits[torch.tensor([rows.index(row) for row in own], device=self.device)]

    def decode(self, tokens: Tensor, positions: Tensor, read: int) -> Tensor:
        """Append a token [b] to each of the first b rows; next-token logits [b, V], float32.

        Everything that changes from step to step comes in by the two tensors: this can be captured.
        """
        self.cache.aim_first(len(tokens), positions[:, None], read)
        return self._run(tokens[:, None], positions[:, None], torch.zeros_like(tokens), read)

    def _run(self, ids: Tensor, positions: Tensor, last: Tensor, read: int) -> Tensor:
        """Logits after position ``last`` [b] of every row of ``ids`` [b, q]."""
        # As it is added to the scores, with a row for every folded query (`_slot_attention`). Made
        # of True and False, or without the fold, it would be made anew in every layer.
        queries = positions.clamp(max=self._max_length - 1).repeat(1, self._shared)
        mask = self._band.unfold(0, read, 1)[self._max_length - 1 - queries]
        hidden = self._body(
            input_ids=ids,
            attention_mask=mask[:, None],
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        rows = torch.arange(len(ids), device=self.device)
        if type(self._head) is nn.Linear and getattr(self._head, "bias", None) is None:
            return wide_product(hidden[rows, last], self._head.weight).float()
        logits: Tensor = self._head(hidden[rows, last])
        return logits.float()


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


def _check_config(config: Any) -> None:
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(f"engine=hf reads full attention only, the model has {sorted(kinds)}")
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        value = getattr(config, name, None)
        if value not in (None, 1):
            raise ValueError(
                f"engine=hf takes lm_head's logits as they are, the model has {name}={value}"
            )


def _query_heads_per_key(config: Any) -> int:
    """How many query heads share a key-value head, the same in every layer."""
    keys = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if not isinstance(keys, int):
        raise ValueError(f"engine=hf wants as many key-value heads in every layer, got {keys}")
    return int(config.num_attention_heads) // keys


def _slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
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
        raise ValueError("engine=hf computes plain attention, this model has soft-capping or sinks")
    batch, heads, width, size = query.shape
    shared = heads // key.shape[1]
    folded = query.reshape(batch, key.shape[1], shared * width, size)
    attended = scaled_dot_product_attention(
        folded, key, value, attn_mask=attention_mask.to(query.dtype), scale=scaling
    )
    return attended.reshape(batch, heads, width, size).transpose(1, 2), None
