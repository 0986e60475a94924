"""What all ranks hold, for what is a matter of the whole rollout batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def several_ranks() -> bool:
    """Whether other ranks take part."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def number_of_ranks() -> int:
    """How many ranks take part, this one included."""
    return dist.get_world_size() if several_ranks() else 1


def this_rank() -> int:
    """This rank's number, from 0 on."""
    return dist.get_rank() if several_ranks() else 0


def on_first_rank(work: Callable[[], T]) -> T:
    """What ``work`` returns, or raises, on rank 0, which alone does it; every rank must call it."""
    if not several_ranks():
        return work()
    done: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            done = [work()]
        except Exception as error:  # the others would wait for ever
            done = [error]
    dist.broadcast_object_list(done, src=0)
    if isinstance(done[0], Exception):
        raise done[0]
    result: T = done[0]
    return result


def barrier() -> None:
    """Come back once every rank is here."""
    if several_ranks():
        dist.barrier()


def summed(value: Tensor) -> Tensor:
    """``value`` summed over ranks, in place; every rank must call it."""
    if several_ranks():
        dist.all_reduce(value)
    return value


def of_each_rank(mine: T) -> list[T]:
    """What each rank holds, in their order; every rank must call it, with any plain data."""
    if not several_ranks():
        return [mine]
    found: list[T] = [mine] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def from_all_ranks(mine: list[T]) -> list[T]:
    """The entries of all ranks, one rank after the other."""
    return [*chain.from_iterable(of_each_rank(mine))]


def over_ranks(column: Tensor) -> tuple[Tensor, slice]:
    """The rows of every rank, one rank after the other, and where this rank's rows are.

    Every rank must call it, with a column [n] of its own length. On a single rank the column comes
    back as it is.
    """
    if not several_ranks():
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


def apart(labels: Tensor) -> Tensor:
    """Labels from 0 on, [n], that every rank has given anew, made to differ from those of others.

    The order of labels stays: it is that of the ranks, and within a rank its own.
    """
    used = int(labels.max()) + 1 if len(labels) else 0
    return labels + sum(of_each_rank(used)[: this_rank()])


def places_of_rows(group: Tensor) -> tuple[Tensor, int]:
    """Where this rank's rows stand in the batch that one process would have, [S], and its length.

    Args:
        group: The group of each row, [S]; a group's rows are on one rank, in their order.
    """
    groups, mine = over_ranks(group)
    return groups.argsort(stable=True).argsort()[mine], len(groups)


def whole_columns(
    columns: Sequence[Tensor], group: Tensor
) -> tuple[Sequence[Tensor], Tensor | slice]:
    """The rows of every rank in the order of one process, and where this rank's rows are.

    Arguments are as for `places_of_rows`. On a single rank the columns come back as they are.
    """
    if not several_ranks():
        return columns, slice(None)
    places, _ = places_of_rows(group)
    order = over_ranks(places)[0].argsort()
    return [over_ranks(column)[0][order] for column in columns], places
