"""The part of the benchmarks that decides: growth, and what counts as a loss."""

import json
import sys

import pytest


@pytest.fixture(scope="module")
def ratios(import_benchmark):
    return import_benchmark("ratios")


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_found(power, import_benchmark):
    growth_exponent = import_benchmark("common").growth_exponent
    sizes = [10, 20, 40, 80]
    assert growth_exponent(sizes, [3 * size**power for size in sizes]) == pytest.approx(power)
    with pytest.raises(ValueError, match="two different sizes"):
        growth_exponent([4, 4], [1.0, 2.0])


def test_a_ratio_may_lose_a_quarter_and_no_more(ratios):
    committed = {"rollout": 4.0, "environment": 20.0}
    assert ratios.losses({"rollout": 3.0, "environment": 30.0}, committed) == []
    (said,) = ratios.losses({"rollout": 2.9, "environment": 20.0}, committed)
    assert said == "rollout: 2.90, committed 4.00: a loss of 28%, allowed 25%"


def test_a_ratio_that_is_missing_on_one_side_fails_the_guard(ratios):
    assert ratios.losses({}, {"rollout": 4.0}) == ["rollout: committed, but not measured"]
    (said,) = ratios.losses({"rollout": 4.0}, {})
    assert said.startswith("rollout: measured, but not committed")


def run_guard(ratios, monkeypatch, folder, measured, *arguments):
    monkeypatch.setattr(ratios, "measure", lambda: measured)
    monkeypatch.setattr(ratios, "COMMITTED", folder / "ratios.json")
    monkeypatch.setattr(sys, "argv", ["ratios.py", *arguments])
    ratios.main()


def test_the_guard_passes_on_what_it_wrote_and_fails_on_a_loss(ratios, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="--update"):
        run_guard(ratios, monkeypatch, tmp_path, {"rollout": 4.0})
    run_guard(ratios, monkeypatch, tmp_path, {"rollout": 4.0}, "--update")
    assert json.loads((tmp_path / "ratios.json").read_text())["ratios"] == {"rollout": 4.0}
    run_guard(ratios, monkeypatch, tmp_path, {"rollout": 3.5})
    with pytest.raises(SystemExit, match="Slower than committed"):
        run_guard(ratios, monkeypatch, tmp_path, {"rollout": 2.0})


def test_a_server_is_measured_though_none_is_given_or_lost_from_the_guard(
    ratios, monkeypatch, tmp_path, capsys
):
    known = {"rollout": 4.0, ratios.VLLM: 6.0}
    (tmp_path / "ratios.json").write_text(json.dumps({"ratios": known}))
    guard = (ratios, monkeypatch, tmp_path, {"rollout": 4.0})
    run_guard(*guard)
    assert f"{ratios.VLLM} is left out: no vLLM is given: type --vllm" in capsys.readouterr().out
    run_guard(*guard, "--update")
    assert json.loads((tmp_path / "ratios.json").read_text())["ratios"] == known
    run_guard(*guard, "--vllm", str(tmp_path))
    assert f"{tmp_path} has no bin/vllm: python scripts/vllm_cpu.py" in capsys.readouterr().out
    (tmp_path / "config.json").touch()
    place = ("--vllm", "http://127.0.0.1:9", "--chat-model", str(tmp_path))
    monkeypatch.setattr(ratios, "measure_vllm", lambda *_: {ratios.VLLM: 4.4})
    with pytest.raises(SystemExit, match=f"{ratios.VLLM}: 4.40, committed 6.00: a loss of 27%"):
        run_guard(*guard, *place)


def test_the_word_game_is_the_same_for_the_same_actions_and_ragged_for_others(import_benchmark):
    world = import_benchmark("word_world")

    def play(actions):
        game = world.WordGame(turns=6)
        told = [game.reset(options={"task_id": "train/1"})[0]]
        for action in actions:
            text, _, is_over, *_ = game.step(action)
            told.append(text)
            if is_over:
                break
        return told

    episodes = [play([f"say {first}"] + ["on"] * 6) for first in range(12)]
    assert episodes[3] == play(["say 3"] + ["on"] * 6)
    assert len({episode[0] for episode in episodes}) == 1
    assert {len(episode) - 1 for episode in episodes} > {4, 5}
    assert all(3 <= len(episode) - 1 <= 6 for episode in episodes)
    assert all(episode[-1].endswith(world.DONE) for episode in episodes)


def test_one_good_measurement_of_three_passes_and_the_worst_is_committed(ratios):
    committed = {"rollout": 4.0, "environment": 20.0}
    slow, fast = {"rollout": 2.0, "environment": 21.0}, {"rollout": 3.9, "environment": 9.0}
    queue = iter([slow, fast])
    assert ratios.best_of(lambda: next(queue), committed) == {"rollout": 3.9, "environment": 21.0}
    queue = iter([slow, slow, slow])
    assert ratios.best_of(lambda: next(queue), committed)["rollout"] == 2.0
    assert next(queue, None) is None, "three tries"
    assert ratios.least([slow, fast]) == {"rollout": 2.0, "environment": 9.0}
