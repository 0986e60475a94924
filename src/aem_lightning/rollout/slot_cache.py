"""Keys and values of many episodes in one preallocated block a layer, written and read by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class SlotCache:
    """A key-value cache of ``slots`` rows, in the place of HF's own cache classes.

    Per layer and for keys and values alike it holds ``[slots, kv_heads, length, head_dim]``,
    allocated when a layer first writes, on that layer's device and in the dtype that attention
    computes in: autocast's, else the layer's. A row keeps its tokens at their own positions from 0
    on, without holes. The last position is a bin: the last token of a response is never fed, so
    only padding lands there, where no valid query looks.
    """

    is_compileable = False

    def __init__(self, slots: int, length: int) -> None:
        self.slots = slots
        self.length = length
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._rows = torch.empty(0, dtype=torch.long)
        self._span: slice | None = None
        self._positions = self._rows
        self._read = 0

    def aim(self, rows: Sequence[int], positions: Tensor, read: int) -> None:
        """Say where the next forward pass writes and how far it reads.

        The tokens of a batch row go to ``positions``, [b, q], of its slot, one of the ascending
        ``rows``; queries may look at the first ``read`` positions.
        """
        self._rows = torch.tensor(rows, device=positions.device)[:, None]
        first, last = rows[0], rows[-1]
        # Neighbouring rows are read as a view; a gather would copy every key and value once a layer
        # and step.
        self._span = slice(first, last + 1) if last - first + 1 == len(rows) else None
        self._positions = positions
        self._read = read

    def aim_first(self, count: int, positions: Tensor, read: int) -> None:
        """`aim` at the rows 0 to ``count`` - 1, without a number that comes from the host."""
        self._rows = torch.arange(count, device=positions.device)[:, None]
        self._span = slice(0, count)
        self._positions = positions
        self._read = read

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values [b, kv_heads, q, head_dim]; return what is read."""
        return (
            self._write(self._keys, keys, layer_idx),
            self._write(self._values, values, layer_idx),
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Always 0: positions are handed to the model, never derived from the cache."""
        return 0

    def crops(self, row: int, tokens: int) -> bool:
        """Whether a row can go back to its first ``tokens``: always."""
        return True

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Always 0, likewise; asked where a mask is made."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Keys that are read, and the position of the first."""
        return self._read, 0

    def copy(self, source: Sequence[int], target: Sequence[int], tokens: int) -> None:
        """Copy the first ``tokens`` of the source rows to the target rows, all at once."""
        # One upload, in place of two a block: a list in an index is uploaded by itself.
        rows = torch.tensor([list(source), list(target)])
        for block in (*self._keys.values(), *self._values.values()):
            rows = rows.to(block.device)  # where layers lie on several, a few more
            block[rows[1], :, :tokens] = block[rows[0], :, :tokens]

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated."""
        blocks = (*self._keys.values(), *self._values.values())
        return sum(block.nbytes for block in blocks)

    def held(self, tokens: int, most: int) -> dict[str, Tensor] | None:
        """The first ``tokens`` of every row, on the CPU, by name; ``None`` above ``most`` bytes."""
        blocks = {f"keys.{layer}": block for layer, block in self._keys.items()}
        blocks |= {f"values.{layer}": block for layer, block in self._values.items()}
        held = {name: block[:, :, :tokens] for name, block in blocks.items()}
        if sum(view.nbytes for view in held.values()) > most:
            return None
        return {name: view.to("cpu", copy=True).contiguous() for name, view in held.items()}

    def fill(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Put back what `held` gave."""
        for name, tensor in tensors.items():
            kind, _, layer = name.partition(".")
            store = self._keys if kind == "keys" else self._values
            if int(layer) not in store:
                slots, heads, _, width = tensor.shape
                shape = slots, heads, self.length, width
                store[int(layer)] = tensor.new_zeros(shape, device=device)
            store[int(layer)][:, :, : tensor.shape[2]] = tensor.to(store[int(layer)].device)

    def _write(self, store: dict[int, Tensor], new: Tensor, layer_idx: int) -> Tensor:
        block = store.get(layer_idx)
        if block is None:
            _, heads, _, width = new.shape
            # Zeros, not empty: a masked NaN would still be a NaN after the attention's matrix
            # product.
            kind = compute_dtype(new.device, new.dtype)
            block = new.new_zeros(self.slots, heads, self.length, width, dtype=kind)
            store[layer_idx] = block
        rows, positions = self._rows.to(block.device), self._positions.to(block.device)
        block[rows, :, positions] = new.transpose(1, 2).to(block.dtype)
        if self._span is not None:
            return block[self._span, :, : self._read]
        return block[rows[:, 0], :, : self._read]


def bytes_of_token(config: Any, kind: torch.dtype) -> int:
    """Bytes of the keys and values of a token, over all layers; ``config`` is transformers'."""
    queries = config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or queries
    width = getattr(config, "head_dim", None) or config.hidden_size // queries
    return int(2 * config.num_hidden_layers * heads * width * kind.itemsize)


def compute_dtype(device: torch.device, stored: torch.dtype) -> torch.dtype:
    """What matrix products on ``device`` compute in: autocast's type, else the ``stored`` one."""
    autocast = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if autocast else stored


def free_bytes(device: torch.device) -> int | None:
    """Bytes of ``device`` that can still be had; ``None`` on a CPU, whose memory is paged."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + cached


def check_room(token_bytes: int, slots: int, length: int, free: int) -> None:
    """Raise where keys and values of ``slots`` episodes do not fit into ``free`` bytes.

    Args:
        token_bytes: Of the keys and values of a token, `bytes_of_token`.
        slots: Episodes that can be open at once.
        length: Tokens of each.
        free: What there is.

    Raises:
        MemoryError: With what fits.
    """
    needed = token_bytes * slots * length
    if needed <= free:
        return
    fits = free // (token_bytes * length)
    shorter = free // (token_bytes * slots)
    raise MemoryError(
        f"The keys and values of engine=hf take {needed / 1e9:.1f} GB (concurrency={slots} "
        f"episodes of max_context={length} tokens, {token_bytes / 1e3:.0f} kB each), and "
        f"{free / 1e9:.1f} GB are left beside the model. Type concurrency={max(1, fits)} or "
        f"max_context={shorter}"
        + ("" if fits else ": not one episode fits, so take both down, or a smaller policy=...")
    )
