"""The rollout's benchmark: what a budget cuts, and what the work of a doubling is."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode


@pytest.fixture(scope="module")
def bench(import_benchmark):
    return import_benchmark("bench_rollout")


@pytest.fixture(scope="module")
def model(bench):
    return bench.make_model("tiny")


def test_operations_are_not_those_that_a_pass_makes(bench, model):
    """Attention of all pairs, as a plain pass has it, is twice the causal half."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.set_attn_implementation("eager")
        model(input_ids=torch.ones(1, 512, dtype=torch.long), use_cache=False)
    half = bench.operations(model, 512) - 2.0 * model.num_parameters() * 512
    assert counter.get_total_flops() == pytest.approx(bench.operations(model, 512) + half, rel=0.01)


def test_operations_of_a_sequence_change_when_it_is_cut(bench, model):
    whole = bench.operations(model, 300)
    assert bench.operations(model, 100) + bench.operations(model, 200, 100) == whole


def test_a_prompt_counts_for_every_copy_of_its_group(bench):
    work = bench.Work(episodes=4, turns=2, group_size=2)
    episodes = bench.script(work)
    for episode in episodes:
        episode.respond(0, [1])
    prompts = [len(episode.ids) for episode in bench.script(work)]
    assert bench.forked(work, episodes) == [0, prompts[1], 0, prompts[3]]


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
