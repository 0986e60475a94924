"""Columns of all ranks, for statistics over the whole rollout batch."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def over_ranks(column: Tensor) -> tuple[Tensor, slice]:
    """The rows of every rank, one rank after the other, and where this rank's rows are.

    Every rank must call it, with a column [n] of its own length. On a single rank the column comes
    back as it is.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return column, slice(None)
    size = torch.tensor([len(column)], device=column.device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    lengths = [int(length) for length in sizes]
    if not any(lengths):
        return column, slice(None)
    padded = column.new_zeros(max(lengths))
    padded[: len(column)] = column
    if column.dtype == torch.bool:
        padded = padded.byte()  # not every backend gathers booleans
    parts = [torch.zeros_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    rank = dist.get_rank()
    start = sum(lengths[:rank])
    rows = torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
    return rows.to(column.dtype), slice(start, start + lengths[rank])
