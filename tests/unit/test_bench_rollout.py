"""The rollout's benchmark: what a budget cuts, and what is said of it."""

import pytest


@pytest.fixture(scope="module")
def bench(import_benchmark):
    return import_benchmark("bench_rollout")


@pytest.fixture(scope="module")
def model(bench):
    return bench.make_model("tiny")


@pytest.mark.parametrize("name", ["engine", "generate"])
def test_a_spent_budget_lets_a_player_go_on(bench, model, name):
    work = bench.Work(episodes=2, turns=2, group_size=2)
    result = bench.measure(model, name, work, check=False, budget=0.0)
    assert result["tokens"] == 0
    assert result["played"] == 0


def test_what_generate_cannot_play_in_time_is_given_to_trl(bench, monkeypatch):
    monkeypatch.setattr(bench, "measure_trl", lambda *_: pytest.fail("it can't be stopped"))
    report = bench.compare(bench.Work(2, 2, 2), ("engine", "generate", "trl"), budget=0.0)
    assert report["ratios"] == {"engine": None, "generate": None}
