"""The benchmark of growth: what is doubled, and over what its costs are fitted."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode


@pytest.fixture(scope="module")
def bench(import_benchmark):
    return import_benchmark("bench_growth")


def test_the_benchmark_does_not_run(bench, tmp_path, capsys):
    target = tmp_path / "growth.json"
    sizes = ["--turns", "1", "2", "--update-turns", "2", "4", "--episodes", "1", "2"]
    bench.main(["--models", "tiny", *sizes, "--json", str(target)])
    found = json.loads(target.read_text(encoding="utf-8"))
    works = [(cost["work"], cost["doubled"]) for cost in found["costs"]]
    assert works == [
        *(("rollout, tiny, turns", turns) for turns in (1, 2)),
        *(("rollout, tiny, turns, window of 2", turns) for turns in (1, 2)),
        *(("rollout, tiny, episodes", size) for size in (1, 2)),
        *(("update, tiny, turns", turns) for turns in (2, 4)),
        *(("update, tiny, episodes", size) for size in (1, 2)),
    ]
    assert all(cost["tokens"] > 0 and cost["seconds"] > 0 for cost in found["costs"])
    shown = capsys.readouterr().out
    assert "update, tiny, turns: seconds over operations" in shown


@pytest.fixture(scope="module")
def model(bench):
    return bench.make_model("tiny")


# Attention of all pairs, as a plain pass has it, is twice the causal half; backwards, eager
# attention keeps its scores, so that it costs thrice the forward pass.
@pytest.mark.parametrize(("backward", "more"), [(False, 1.0), (True, 2.5)])
def test_operations_are_not_those_that_a_pass_makes(bench, model, backward, more):
    counter = FlopCounterMode(display=False)
    embedded = torch.zeros(1, 512, model.config.hidden_size, requires_grad=backward)
    model.requires_grad_(False)
    model.set_attn_implementation("eager")
    with counter:
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        if backward:
            logits.sum().backward()
    half = bench.operations(model, 512) - 2.0 * model.num_parameters() * 512
    expected = bench.operations(model, 512, backward=backward) + more * half
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


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


def test_seconds_are_not_fitted_over_tokens_and_operations(bench):
    costs = [bench.Cost("rollout, x, turns", n, n, n**1.5, n**1.5, None) for n in (1, 2, 4)]
    assert bench.exponents_of(costs) == {
        "rollout, x, turns: seconds over tokens": pytest.approx(1.5),
        "rollout, x, turns: seconds over operations": pytest.approx(1.0),
    }
    # Operations say nothing where nothing grows but episodes.
    costs = [bench.Cost("update, x, episodes", n, n, n, n, n) for n in (1, 2)]
    assert set(bench.exponents_of(costs)) == {
        "update, x, episodes: seconds over tokens",
        "update, x, episodes: extra_mib",
    }
