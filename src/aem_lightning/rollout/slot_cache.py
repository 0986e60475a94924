"""Keys and values of many episodes in one block a layer, written and read by row, grown by need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from aem_lightning.rollout.padding import Piece, doubled, halved
from aem_lightning.rollout.varlen import head_size

PAGE = 256  # tokens that a row has room for at first
SPARE = 4  # times the last need: more is given back


class SlotCache:
    """A key-value cache of ``slots`` rows, in the place of HF's own cache classes.

    Per layer and for keys and values alike it holds ``[rows, kv_heads, tokens, head_dim]``,
    allocated when a layer first writes, on that layer's device and in the dtype that attention
    computes in: autocast's, else the layer's. Rows and tokens double when they run out, up to
    ``slots`` and ``length`` (`block_shape`). A row keeps its tokens at their own positions from 0
    on, without holes. The last position is a bin: no row gets there, or, of the full length, as the
    last token of a response is never fed; only padding lands there, where no valid query looks.

    Args:
        slots: Rows at most.
        length: Tokens of a row at most, the bin among them.
        tokens_first: In memory the tokens of a row come before its heads, as `attend_used` reads.

    Attributes:
        shape: Rows and tokens of every block; zeros before the first.
        moves: How often blocks have changed their place.
        pieces: Rows of the pass under way that read less than others; none where all read the same.
        used: [b] int32, tokens that each row of the pass under way reads, where attention stops
            there by itself: it is handed whole rows then.
    """

    is_compileable = False

    def __init__(self, slots: int, length: int, *, tokens_first: bool = False) -> None:
        self.slots = slots
        self.length = length
        self.tokens_first = tokens_first
        self.shape = (0, 0)
        self.moves = 0
        self._need = (0, 0)  # rows and tokens since the last `forget`
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._rows = torch.empty(0, dtype=torch.long)
        self._span: slice | None = None
        self._positions = self._rows
        self._read = 0
        self.pieces: Sequence[Piece] = ()
        self.used: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens that every row has room for, the bin among them."""
        return self.shape[1]

    def fit(self, rows: int, tokens: int) -> None:
        """Have room for the first ``rows`` rows of ``tokens`` tokens.

        Raises:
            MemoryError: A GPU has no room for that.
        """
        self._need = max(self._need[0], rows), max(self._need[1], tokens)
        rows, tokens = block_shape(*self._need, self.slots, self.length)
        self._resize(max(rows, self.shape[0]), max(tokens, self.shape[1]))

    def forget(self) -> None:
        """Nothing that is held is read again."""
        self._need = (0, 0)

    def trim(self) -> None:
        """Give back what is `SPARE` times as much as was needed since `forget`; the rest stays."""
        rows, tokens = block_shape(*self._need, self.slots, self.length)
        if SPARE * rows * tokens <= self.shape[0] * self.shape[1]:
            self._resize(rows, tokens)

    def aim(
        self,
        rows: Sequence[int],
        positions: Tensor,
        read: int,
        pieces: Sequence[Piece] = (),
        *,
        stops: bool = False,
    ) -> None:
        """Say where the next forward pass writes and how far it reads.

        The tokens of a batch row go to ``positions``, [b, q], of its slot, one of the ascending
        ``rows``; queries may look at the first ``read`` positions, or those of their piece. Where
        attention ``stops``, a row reads up to its own last position.
        """
        first, last = rows[0], rows[-1]
        # Neighbouring rows are read as a view; a gather would copy every key and value once a layer
        # and step.
        span = slice(first, last + 1) if last - first + 1 == len(rows) else None
        self._aim(torch.tensor(rows, device=positions.device), span, positions, read, stops)
        self.pieces = pieces

    def aim_first(self, count: int, positions: Tensor, read: int, *, stops: bool = False) -> None:
        """`aim` at the rows 0 to ``count`` - 1, without a number that comes from the host."""
        rows = torch.arange(count, device=positions.device)
        self._aim(rows, slice(0, count), positions, read, stops)

    def _aim(
        self, rows: Tensor, span: slice | None, positions: Tensor, read: int, stops: bool
    ) -> None:
        self._rows, self._span = rows[:, None], span
        self._positions, self._read = positions, read
        self.pieces, self.used = (), None
        if stops:  # rows that begin in the bin have nothing to read
            first, width = positions[:, 0], positions.shape[1]
            in_bin = first == self.tokens - 1
            self.used = torch.where(in_bin, width, first + width).to(torch.int32)

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
        self.fit(max(target) + 1, tokens)
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
            slots, heads, tokens, width = tensor.shape
            self.fit(slots, tokens)
            kind, _, layer = name.partition(".")
            store = self._keys if kind == "keys" else self._values
            if int(layer) not in store:
                like = tensor.new_empty(0, device=device)
                store[int(layer)] = self._zeros(like, self.shape[0], heads, self.tokens, width)
            store[int(layer)][:slots, :, :tokens] = tensor.to(store[int(layer)].device)

    def _resize(self, rows: int, tokens: int) -> None:
        if (rows, tokens) == self.shape:
            return
        stores = [store for store in (self._keys, self._values) if store]
        if stores and rows * tokens > self.shape[0] * self.shape[1]:
            free = free_bytes(stores[0][min(stores[0])].device)
            if free is not None:
                of_token = self.nbytes // (self.shape[0] * self.shape[1])
                check_room(of_token, rows, tokens, free + self.nbytes)
        self.moves += 1
        for store in stores:
            for layer, block in store.items():  # one at a time: the old and the new one together
                kept = block[:rows, :, :tokens]
                new = self._zeros(block, rows, block.shape[1], tokens, block.shape[3])
                new[: kept.shape[0], :, : kept.shape[2]] = kept
                store[layer] = new
        self.shape = rows, tokens  # last: where memory runs out, no block is smaller than it says

    def _write(self, store: dict[int, Tensor], new: Tensor, layer_idx: int) -> Tensor:
        block = store.get(layer_idx)
        if block is None:
            _, heads, _, width = new.shape
            like = new.new_empty(0, dtype=compute_dtype(new.device, new.dtype))
            block = self._zeros(like, self.shape[0], heads, self.tokens, width)
            store[layer_idx] = block
        rows, positions = self._rows.to(block.device), self._positions.to(block.device)
        block[rows, :, positions] = new.transpose(1, 2).to(block.dtype)
        if self._span is not None:
            span = block[self._span]
            return span if self.used is not None else span[:, :, : self._read]
        return block[rows[:, 0], :, : self._read]

    def _zeros(self, like: Tensor, rows: int, heads: int, tokens: int, width: int) -> Tensor:
        """A block; zeros, as a masked NaN would still be one after attention's matrix product."""
        if self.tokens_first:
            return like.new_zeros(rows, tokens, heads, width).transpose(1, 2)
        return like.new_zeros(rows, heads, tokens, width)


def block_shape(rows: int, tokens: int, slots: int, length: int) -> tuple[int, int]:
    """Rows and tokens that are allocated where the first ``rows`` hold ``tokens`` at most.

    Example:
        >>> block_shape(5, 255, 64, 4096), block_shape(5, 256, 64, 4096)
        ((8, 256), (8, 512))
        >>> block_shape(40, 2500, 64, 3000)
        (64, 3000)
    """
    return halved(rows, slots), min(length, doubled(tokens + 1, PAGE))


def bytes_of_token(config: Any, kind: torch.dtype) -> int:
    """Bytes of the keys and values of a token, over all layers; ``config`` is transformers'."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * head_size(config) * kind.itemsize)


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
