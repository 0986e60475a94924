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


def test_a_stopped_peer_counts_as_one_that_played_all(bench, capsys):
    work = {"episodes": 8, "turns": 6}
    rates = {"engine": (600.0, 1.0), "generate": (100.0, 0.4), "trl": (150.0, None)}
    results = {
        name: {"tokens_per_second": rate} | ({} if played is None else {"played": played})
        for name, (rate, played) in rates.items()
    }
    results["generate"]["max_logprob_error"] = 2e-6
    ratios = {"engine": 1.0, "generate": 6.0, "trl": 4.0}
    whole = {"work": work, "model": "tiny", "results": results, "ratios": ratios}
    bench.show_ratios([whole])
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-2].split("│")]
    assert cells[1:-1] == ["tiny, 8 x 6", "600", "100", "6+", "4", "2e-06"]
