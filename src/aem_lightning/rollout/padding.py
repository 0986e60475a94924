"""Prompts in few shapes: on a GPU, kernels are planned anew for every shape that comes up.

cuDNN's masked attention takes 20 to 40 ms for a new shape and forgets none; without this, hardly
two waves of prompts are alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

NARROWEST, FEWEST = 64, 4


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
    """``rows``, ascending, and as many others that their number is 4, 8, 16, ..., or all slots.

    Gaps between them are filled first, then what follows: neighbours are read without a copy.

    Example:
        >>> filled([3, 5, 6], 8), filled([0, 1, 2, 3, 4], 6), filled([7], 8)
        ([3, 4, 5, 6], [0, 1, 2, 3, 4, 5], [4, 5, 6, 7])
    """
    own, count = set(rows), min(slots, doubled(len(rows), FEWEST))
    others = [*range(rows[0], slots), *range(rows[0] - 1, -1, -1)]
    fillers = [row for row in others if row not in own][: count - len(rows)]
    return sorted([*rows, *fillers])


def spread(rows: Sequence[int], own: Sequence[int], values: Sequence[T], other: T) -> list[T]:
    """The value of each of ``rows``: ``values`` are those of its ``own`` ones.

    Example:
        >>> spread([3, 4, 5], [3, 5], ["a", "b"], "-")
        ['a', '-', 'b']
    """
    known = dict(zip(own, values, strict=True))
    return [known.get(row, other) for row in rows]
