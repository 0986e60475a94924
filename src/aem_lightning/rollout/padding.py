"""Rows of unlike lengths in one batch: what is padded to what, and which read together.

Prompts come in few shapes on a GPU, where kernels are planned anew for every shape that comes up:
cuDNN's masked attention takes 20 to 40 ms for a new shape and forgets none; without this, hardly
two waves of prompts are alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple, TypeVar

T = TypeVar("T")

NARROWEST, SMALLEST = 64, 8
# Tokens that cost a GPU as much as another pass does, which it spends on starting kernels.
FREE_PADDING = 1024

# Attention on a CPU takes keys in blocks of so many. A row that reads more blocks, all masked,
# comes out in the same bits; one that reads a shorter block may not.
BLOCK = 512
# Keys that are read for nothing where another call of attention in every layer costs more.
FREE_READS = 2048


class Piece(NamedTuple):
    """Neighbouring rows of a batch that read the same number of keys."""

    rows: slice
    read: int


def pieces_of(ends: Sequence[int], read: int) -> list[Piece]:
    """A batch in pieces that read no more than they need; none where one for all is the cheapest.

    Args:
        ends: Keys that each row may look at; those of some rows are padding.
        read: Keys that the whole batch would read.

    Example:
        >>> pieces_of([100, 600, 4000, 200], 4096)
        [Piece(rows=slice(0, 2, None), read=1024), Piece(rows=slice(2, 3, None), read=4096), \
Piece(rows=slice(3, 4, None), read=512)]
        >>> pieces_of([100, 600, 1000, 200], 1024)
        []
    """
    pieces, row = list[Piece](), 0
    for own, alike in groupby(min(read, -(-end // BLOCK) * BLOCK) for end in ends):
        first, row = row, row + len(list(alike))
        if pieces:
            (rows, before), widest = pieces[-1], max(pieces[-1].read, own)
            apart = (first - rows.start) * before + (row - first) * own + FREE_READS
            if (row - rows.start) * widest <= apart:
                pieces[-1] = Piece(slice(rows.start, row), widest)
                continue
        pieces.append(Piece(slice(first, row), own))
    return pieces if len(pieces) > 1 else []


def doubled(size: int, least: int) -> int:
    """``least``, doubled until it is ``size`` or more.

    Example:
        >>> doubled(3, 4), doubled(5, 4), doubled(300, 128)
        (4, 8, 512)
    """
    while least < size:
        least *= 2
    return least


def widened(width: int) -> int:
    """The width of a wave, a multiple of 64 that is 1, 2, 3, 4, 6, 8, 12, ... times 64.

    Example:
        >>> [widened(width) for width in (5, 65, 129, 200, 257, 400, 1030)]
        [64, 128, 192, 256, 384, 512, 1536]
    """
    whole = doubled(width, NARROWEST)
    return 3 * whole // 4 if whole > 2 * NARROWEST and 4 * width <= 3 * whole else whole


def filled(rows: Sequence[int], slots: int) -> list[int]:
    """``rows``, ascending, and as many others that their number is 1, 2, 4, ..., or all slots.

    Gaps between them are filled first, then what follows: neighbours are read without a copy.

    Example:
        >>> filled([3, 5, 6], 8), filled([0, 1, 2, 3, 4], 6), filled([5, 6, 7], 8)
        ([3, 4, 5, 6], [0, 1, 2, 3, 4, 5], [4, 5, 6, 7])
    """
    own, count = set(rows), min(slots, doubled(len(rows), 1))
    others = [*range(rows[0], slots), *range(rows[0] - 1, -1, -1)]
    fillers = [row for row in others if row not in own][: count - len(rows)]
    return sorted([*rows, *fillers])


def head_of(count: int, width: int, slots: int) -> int:
    """Rows of a wave of ``count`` to compute apart, before the others; 0: all in one pass.

    Example:
        >>> head_of(65, 256, 128), head_of(60, 256, 128), head_of(9, 64, 128)
        (64, 0, 0)
    """
    head = doubled(count + 1, 1) // 2
    whole, rest = (min(slots, doubled(rows, 1)) for rows in (count, count - head))
    return head if (whole - head - rest) * widened(width) > FREE_PADDING else 0


def spread(rows: Sequence[int], own: Sequence[int], values: Sequence[T], other: T) -> list[T]:
    """The value of each of ``rows``: ``values`` are those of its ``own`` ones.

    Example:
        >>> spread([3, 4, 5], [3, 5], ["a", "b"], "-")
        ['a', '-', 'b']
    """
    known = dict(zip(own, values, strict=True))
    return [known.get(row, other) for row in rows]


def halved(rows: int, slots: int) -> int:
    """Rows of the cache, or of a graph, for ``rows`` rows: all slots, halved while that is enough.

    Example:
        >>> halved(5, 128), halved(33, 128), halved(70, 128), halved(5, 6)
        (8, 64, 128, 6)
    """
    size = slots
    while size // 2 >= max(rows, SMALLEST):
        size //= 2
    return size
