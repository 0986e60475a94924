"""The statistics of the analyses, in float64: correlations, intervals, paired tests."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
from torch import Tensor

EXACT_SEEDS = 16


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95 % interval; ``None`` where ``count`` units do not say anything.

    Attributes:
        value: The statistic.
        low: Lower end.
        high: Upper end.
        count: Independent units that it rests on: states, or seeds.
    """

    value: float | None
    low: float | None
    high: float | None
    count: int


def co_moments(x: Tensor, y: Tensor, cluster: Tensor, count: int) -> Tensor:
    """Sums from which a correlation follows, for each of ``count`` clusters: n, x, y, xx, yy, xy.

    Of points [P] and the cluster of each, [P] in 0..K-1: [K, 6], float64, of values centred over
    all points, so that little is lost to rounding.
    """
    x, y = x.double(), y.double()
    if len(x):
        x, y = x - x.mean(), y - y.mean()
    rows = torch.stack([torch.ones_like(x), x, y, x * x, y * y, x * y], dim=1)
    return rows.new_zeros(count, 6).index_add(0, cluster, rows)


def pearson(moments: Tensor) -> Tensor:
    """Pearson's r of summed ``co_moments``, [..., 6] to [...]; NaN where x or y does not vary.

    Example:
        >>> x, y = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0])
        >>> round(pearson(co_moments(x, y, torch.zeros(3, dtype=torch.long), 1)[0]).item(), 9)
        1.0
    """
    n, x, y, xx, yy, xy = moments.unbind(-1)
    # Counts are at least 1 wherever anything varies; rounding may leave a variance just under 0.
    n = n.clamp(min=1)
    spread_x, spread_y = xx - x * x / n, yy - y * y / n
    small = 1e-12
    varies = (spread_x > small * (1 + xx)) & (spread_y > small * (1 + yy))
    scale = (spread_x * spread_y).clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    r = ((xy - x * y / n) / scale).clamp(-1, 1)
    return torch.where(varies, r, torch.full_like(r, math.nan))


def share(sums: Tensor) -> Tensor:
    """The first of two summed columns over the second, [..., 2] to [...]; NaN for 0/0."""
    return sums[..., 0] / sums[..., 1]


def bootstrap(
    table: Tensor, statistic: Callable[[Tensor], Tensor], *, draws: int, seed: int
) -> Estimate:
    """A statistic of column sums, with the percentile interval of resampled rows.

    The rows of ``table``, [K, C], are the independent units: points of one cluster stay together.
    ``statistic`` is from summed columns [..., C] to [...].
    """
    rows = len(table)
    value = float(statistic(table.sum(dim=0)))
    if not math.isfinite(value):
        return Estimate(None, None, None, rows)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(rows, (draws, rows), generator=generator)
    weights = torch.zeros(draws, rows, dtype=torch.float64)
    weights.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.float64))
    found = statistic(weights @ table.double())
    found = found[found.isfinite()]
    if rows < 2 or not len(found):
        return Estimate(value, None, None, rows)
    ends = torch.quantile(found, torch.tensor([0.025, 0.975], dtype=found.dtype))
    return Estimate(value, float(ends[0]), float(ends[1]), rows)


def t_interval(values: Sequence[float], *, rates: bool = False) -> Estimate:
    """The mean of a few runs with Student's 95 % interval, of ``rates`` within 0 to 1.

    One run has no interval.

    Example:
        >>> found = t_interval([1.0, 2.0, 3.0])
        >>> found.value, round(found.high, 4)
        (2.0, 4.4841)
    """
    count = len(values)
    if count == 0:
        return Estimate(None, None, None, 0)
    mean = sum(values) / count
    if count == 1:
        return Estimate(mean, None, None, 1)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    half = t_quantile(count - 1) * spread / math.sqrt(count)
    low, high = mean - half, mean + half
    return Estimate(mean, max(0.0, low) if rates else low, min(1.0, high) if rates else high, count)


@cache
def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, whose atan(t / sqrt(freedom)) has a density of cosines.

    Example:
        >>> round(t_quantile(2), 4), round(t_quantile(4), 4)
        (4.3027, 2.7764)
    """
    angle = torch.linspace(0, math.pi / 2, 1_000_001, dtype=torch.float64)
    density = angle.cos() ** (freedom - 1)
    inside = torch.cumulative_trapezoid(density, angle)  # up to angle[1:]
    place = int(torch.searchsorted(inside, 0.95 * inside[-1]))
    beyond = (inside[place] - 0.95 * inside[-1]) / density[place + 1]
    return math.sqrt(freedom) * math.tan((angle[place + 1] - beyond).item())


def sign_flip_test(differences: Sequence[float], *, draws: int = 100_000, seed: int = 0) -> float:
    """Two-sided p of a paired permutation test: how often random signs give as large a mean.

    Exact (all ``2^n`` signs) up to 16 pairs, else over ``draws`` random ones and the one observed.
    With n pairs it is never under ``2 / 2^n``.

    Raises:
        ValueError: There is no pair.

    Example:
        >>> sign_flip_test([1.0, 2.0, 3.0])
        0.25
    """
    if not differences:
        raise ValueError("sign_flip_test: no pair of runs; at least 1 is needed")
    size = abs(sum(differences)) - 1e-12 * sum(map(abs, differences))

    def reaches(signs: Sequence[int]) -> bool:
        return abs(sum(s * d for s, d in zip(signs, differences, strict=True))) >= size

    if len(differences) <= EXACT_SEEDS:
        hits = [reaches(signs) for signs in product((1, -1), repeat=len(differences))]
        return sum(hits) / len(hits)
    rng = random.Random(seed)
    drawn = sum(reaches([rng.choice((1, -1)) for _ in differences]) for _ in range(draws))
    return (drawn + 1) / (draws + 1)


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact McNemar p: are the games that changed sides split like fair coins?

    The second policy alone won ``gained`` games, the first alone ``lost``.

    Example:
        >>> mcnemar(8, 2)
        0.109375
    """
    changed = gained + lost
    tail = sum(math.comb(changed, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / (1 << changed))
