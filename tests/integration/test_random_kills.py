"""Runs that are killed at any moment end as one that was not."""

from __future__ import annotations

from pathlib import Path

import pytest
from kills import killed_runs

MEMORIES = ("memory=transcript", "memory=window")


def test_a_run_that_is_killed_at_random_ends_with_other_bits(
    toy_model: str, tmp_path: Path
) -> None:
    runs = list(killed_runs(tmp_path, toy_model, kills=3))
    assert sum(kills for kills, _ in runs) == 3
    assert all(same for _, same in runs)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("memory", MEMORIES)
def test_a_hundred_kills(toy_model: str, tmp_path: Path, memory: str) -> None:
    runs = list(killed_runs(tmp_path, toy_model, 100, memory, "max_turns=8", seed=1))
    assert sum(kills for kills, _ in runs) == 100
    assert all(same for _, same in runs)
