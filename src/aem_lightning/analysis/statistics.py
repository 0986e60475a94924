"""The statistics of the analyses, in float64: correlations, intervals, paired tests."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor


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
    mean = statistics.fmean(values)
    if count == 1:
        return Estimate(mean, None, None, 1)
    error = statistics.stdev(values, mean) / math.sqrt(count)
    half = float(stats.t.ppf(0.975, count - 1)) * error
    low, high = mean - half, mean + half
    return Estimate(mean, max(0.0, low) if rates else low, min(1.0, high) if rates else high, count)


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
    if len(differences) == 1:
        return 1.0

    def mean(values: NDArray[Any], axis: int) -> NDArray[Any]:
        return np.asarray(values.mean(axis).round(15))  # so that equal ones are, in any order

    found = stats.permutation_test(
        (differences,), mean, permutation_type="samples", n_resamples=draws, rng=seed
    )
    return float(found.pvalue)


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact McNemar p: are the games that changed sides split like fair coins?

    The second policy alone won ``gained`` games, the first alone ``lost``.

    Example:
        >>> mcnemar(8, 2)
        0.109375
    """
    changed = gained + lost
    return float(stats.binomtest(gained, changed).pvalue) if changed else 1.0
