"""The rollout's benchmark: what a budget cuts, and what is said of it."""

import math
from types import SimpleNamespace

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


def test_vllm_and_the_engine_play_other_work(bench, model, import_benchmark):
    """Sixteen episodes of six turns of 24 tokens, through the calls that any engine has."""
    peer = import_benchmark("vllm_peer")
    episodes = peer.episodes_of(peer.WORK)
    assert [e.lengths for e in episodes] == [[24] * 6] * 16
    assert max(map(import_benchmark("players").length, episodes)) <= peer.LONGEST
    engine = peer.SlotEngine(2, 1024)
    policy = SimpleNamespace(causal_lm=model)
    spent = iter((1.0, 3.0))
    found = peer.measure(engine, policy, bench.Work(2, 2, 2), lambda: next(spent), math.inf)
    assert (found["tokens"], found["played"]) == (2 * 2 * 24, 1.0)
    assert found["tokens_per_cpu_second"] == 2 * 2 * 24 / 2.0


def test_a_run_without_a_server_ends_or_says_nothing(bench, capsys, tmp_path):
    bench.main(["--players", "vllm", "--json", str(tmp_path / "found.json")])
    assert "vllm is left out: no vLLM is given" in capsys.readouterr().out
    assert (tmp_path / "found.json").is_file()
