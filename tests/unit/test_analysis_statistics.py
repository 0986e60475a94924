"""The statistics of the analyses against values that are known otherwise."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import stdev

import pytest
import torch

from aem_lightning.analysis.statistics import (
    bootstrap,
    co_moments,
    mcnemar,
    pearson,
    share,
    sign_flip_test,
    t_interval,
)

# 97.5 % quantiles as printed tables have them.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 30: 2.042}


@pytest.mark.parametrize(("freedom", "quantile"), TABLE.items())
def test_students_quantile_is_not_the_tables(freedom: int, quantile: float) -> None:
    values = [float(n) for n in range(freedom + 1)]
    found = t_interval(values)
    assert found.value is not None
    assert found.high is not None
    error = stdev(values) / math.sqrt(len(values))
    assert (found.high - found.value) / error == pytest.approx(quantile, abs=6e-4)


def test_students_interval_covers_too_seldom() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for row in torch.randn(2000, 3, generator=generator, dtype=torch.float64).tolist():
        found = t_interval(row)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0 <= found.high
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)


def test_one_seed_has_an_interval() -> None:
    assert t_interval([0.4]).low is None
    assert t_interval([]).value is None


def test_the_correlation_is_not_torchs() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, generator=generator, dtype=torch.float64) + 1e3
    y = x + torch.randn(60, generator=generator, dtype=torch.float64)
    cluster = torch.arange(60) % 7
    r = pearson(co_moments(x, y, cluster, 7).sum(dim=0))
    assert r.item() == pytest.approx(torch.corrcoef(torch.stack([x, y]))[0, 1].item(), abs=1e-9)


def test_what_does_not_vary_correlates() -> None:
    ones, ids = torch.ones(5), torch.zeros(5, dtype=torch.long)
    assert math.isnan(pearson(co_moments(ones, torch.arange(5.0), ids, 1)[0]))
    found = bootstrap(co_moments(ones, ones, ids, 1), pearson, draws=10, seed=0)
    assert found.value is None


def test_the_bootstrap_takes_points_of_one_cluster_for_independent() -> None:
    generator = torch.Generator().manual_seed(2)
    per_cluster = (torch.rand(30, generator=generator) < 0.5).double()  # all or nothing
    copies = torch.stack([per_cluster * 100, torch.full((30,), 100.0, dtype=torch.float64)], dim=1)
    single = torch.stack([per_cluster, torch.ones(30, dtype=torch.float64)], dim=1)
    many = bootstrap(copies, share, draws=2000, seed=3)
    few = bootstrap(single, share, draws=2000, seed=3)
    assert (many.low, many.high) == pytest.approx((few.low, few.high))
    assert few.low is not None
    assert few.high is not None
    assert few.high - few.low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 30), rel=0.2)


def test_a_bootstrap_depends_on_more_than_its_seed() -> None:
    table = torch.rand(20, 2, dtype=torch.float64)
    assert bootstrap(table, share, draws=99, seed=4) == bootstrap(table, share, draws=99, seed=4)
    assert bootstrap(table, share, draws=99, seed=4) != bootstrap(table, share, draws=99, seed=5)


def test_sign_flips_are_counted_wrongly() -> None:
    assert sign_flip_test([1.0] * 5) == 2 / 32
    assert sign_flip_test([-1.0] * 5) == 2 / 32
    assert sign_flip_test([0.1, -0.1]) == 1.0
    # |3 - 2 + 1| = 2; of the signed sums ±6, ±4, ±2, ±0 six are as large.
    assert sign_flip_test([3.0, -2.0, 1.0]) == 6 / 8
    # Of 256 signed sums 164 are as large; many of them equal it, and in floats only nearly.
    tied = [n / 10_240 for n in (-64, 46, 20, 64, 28, 8, -50, 6)]
    assert sign_flip_test(tied) == 164 / 256
    with pytest.raises(ValueError, match="no pair"):
        sign_flip_test([])


def test_drawn_sign_flips_differ_from_all_of_them() -> None:
    values = [0.3, -0.1, 0.2, 0.4, -0.2, 0.1, 0.3, 0.05] * 2
    exact = sign_flip_test(values)
    drawn = sign_flip_test([*values, 0.0], draws=20_000)  # 17 pairs: too many to list
    assert drawn == pytest.approx(exact, abs=0.005)


def test_mcnemar_is_not_the_binomial_test() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(6, 0) == 2 / 64
    assert mcnemar(2, 8) == mcnemar(8, 2)
    values = [mcnemar(10 + k, 10 - k) for k in range(11)]
    assert all(a >= b for a, b in pairwise(values))
