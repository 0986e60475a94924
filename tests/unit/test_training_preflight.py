"""What two minutes before training say, and that training does not notice them."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
import torch
from runs import built, composed, equal_bits, toy_config, toy_overrides, weights

from aem_lightning.modules import RolloutSettings
from aem_lightning.runner import preflight as module
from aem_lightning.runner.preflight import DeadlinePool, expected_seconds, play, preflight
from aem_lightning.runner.preflight_report import Played, advice
from aem_lightning.types import EnvStep, Task, Trajectory, Turn

LOCAL = ("datamodule._target_=local_coin.LocalCoin", "evaluate=false")


def test_training_ends_with_other_bits_after_a_preflight(toy_model, tmp_path):
    found = []
    for wish in ("true", "false"):
        cfg = toy_config(tmp_path / wish, toy_model, *LOCAL, f"preflight={wish}", "iterations=2")
        with built(cfg) as (trainer, agent, data):
            drawn = torch.get_rng_state()
            report = preflight(cfg, trainer, agent, data)
            assert torch.equal(drawn, torch.get_rng_state())
            assert all(p.grad is None for p in agent.policy.parameters())
            trainer.fit(agent, datamodule=data)
            found.append((weights(agent), report))
    (after, report), (without, none) = found
    assert none is None
    assert equal_bits(after, without)
    assert report == json.loads((tmp_path / "true" / "preflight.json").read_text())
    assert report["verdict"]["name"] == "learns"
    assert report["episodes"] == report["whole"] == 32  # all tasks of the toy once
    assert 0 < report["success"] < 1
    assert len({record["task"] for record in report["transcripts"]}) == 3
    assert report["longest_batch"]["fits"] is True
    assert report["longest_batch"]["tokens"] == 64 * 128
    assert 0 < report["hours"] < 1
    assert report["forecast"] is None or -1 <= report["forecast"] <= 1


def test_a_preflight_takes_longer_than_its_time(toy_model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PLAY_SECONDS", 0.0)
    monkeypatch.setattr(module, "SECONDS", 0.0)
    cfg = toy_config(tmp_path, toy_model, *LOCAL, "preflight=only")
    with built(cfg) as (trainer, agent, data):
        report = preflight(cfg, trainer, agent, data)
    assert report["verdict"] == {
        "name": "unclear",
        "text": report["verdict"]["text"],
        "bad": False,
    }
    assert report["whole"] == 0
    assert report["hours"] is None
    assert report["longest_batch"]["fits"] is None  # seconds are told without trying it


def test_a_slow_policy_writes_replies_that_nobody_can_stop(monkeypatch):
    asked = []

    def wave(agent, data, tasks, deadline, key, tokens, turns=None):
        asked.append(tokens)
        return Played(14, tokens, [], set(), seconds=10.0)

    monkeypatch.setattr(module, "_wave", wave)
    agent = SimpleNamespace(
        engine=SimpleNamespace(sync=lambda policy, version: None),
        policy=None,
        iteration=0,
        seed=0,
        rollout=RolloutSettings(max_new_tokens=512),
    )
    data = SimpleNamespace(
        train_split="train", tasks=lambda split: [Task(str(n)) for n in range(3)]
    )
    found = play(None, agent, data, time.monotonic() + 75)
    assert asked[0] == 16
    assert asked[1] == found.tokens
    assert 50 <= found.tokens <= 60  # half of the time, at 10 s for 16 tokens
    few = advice(composed(["experiment=quickstart", "max_new_tokens=512"]), found, {"fits": True})
    assert f"cut at {found.tokens} tokens here" in few["text"]


def test_episodes_play_on_after_the_deadline():
    steps = {"a": EnvStep("on"), "b": EnvStep("over", terminated=True)}
    pool = DeadlinePool(SimpleNamespace(receive=lambda: steps), time.monotonic() + 60)
    assert pool.receive() is steps
    pool.deadline = 0.0
    assert {key: step.truncated for key, step in pool.receive().items()} == {"a": True, "b": False}
    assert pool.cut == {"a"}


@pytest.mark.parametrize(
    ("overrides", "parameters", "on_gpu", "is_long"),
    [
        (["experiment=quickstart"], 10**6, False, False),
        (["experiment=alfworld_aem"], 1_500_000_000, True, True),
        (["experiment=quickstart", "iterations=30000"], 10**6, False, True),
    ],
)
def test_a_preflight_comes_by_itself_where_a_run_is_short(overrides, parameters, on_gpu, is_long):
    seconds = expected_seconds(composed(overrides), parameters, on_gpu=on_gpu)
    assert (seconds > 3600) == is_long


def episode(group, copy, *, won=False, action="look", valid=True, reward=0.0, reason="stop"):
    turn = Turn("o", (), "r", action, 0, 1, [-0.5], [0.5], reason, reward, valid)
    return Trajectory(Task(f"t{group}"), group, copy, [turn], [[1, 2]], won=won, score=float(won))


def groups(make):
    return [make(group, copy) for group in range(4) for copy in range(4)]


@pytest.mark.parametrize(
    ("make", "name", "told"),
    [
        (lambda g, c: episode(g, c, won=c == 0, reward=float(c == 0)), "learns", "100 % of the gr"),
        (lambda g, c: episode(g, c, reward=-0.1 * c), "never_wins", "stage=warm_start"),
        (lambda g, c: episode(g, c, won=True, reward=1.0), "always_wins", "nothing to learn"),
        (lambda g, c: episode(g, c, won=g == 0, reward=float(g == 0)), "uniform_groups", "temper"),
        (lambda g, c: episode(g, c, action=None), "malformed_replies", "100 % of the replies hold"),
        (
            lambda g, c: episode(g, c, action=None, reason="length"),
            "malformed_replies",
            "max_new_tokens=512",
        ),
        (lambda g, c: episode(g, c, valid=False), "inadmissible_actions", "action=constrained"),
    ],
)
def test_the_verdict_names_another_cause(make, name, told):
    cfg = composed(["experiment=quickstart", "max_new_tokens=512"])
    found = advice(cfg, Played(14, 512, groups(make)), {"fits": True})
    assert found["name"] == name
    assert told in found["text"]
    assert found["bad"] == (name != "learns")
    if name == "uniform_groups":  # PPO has a critic to compare with
        assert not advice(cfg, Played(14, 512, groups(make)), {"fits": True}, compares=False)["bad"]


def test_broken_or_few_episodes_are_judged():
    cfg = composed(["experiment=quickstart"])
    few = Played(14, 12, groups(lambda g, c: episode(g, c))[:8])
    assert advice(cfg, few, {"fits": False})["name"] == "unclear"
    assert "micro_batch_tokens=4096" in advice(cfg, few, {"fits": False})["text"]
    for trajectory in few.trajectories:
        trajectory.infra_error = "died"
    assert advice(cfg, few, {"fits": True})["name"] == "environment_broken"


def test_a_bad_preflight_ends_with_status_0(command, toy_model, tmp_path):
    # Nobody wins within a turn who has to write five words in two tokens.
    toy = [*toy_overrides(tmp_path, toy_model), *LOCAL, "preflight=only"]
    bad = command("train.py", *toy, "max_new_tokens=2")
    assert bad.status == 3, bad.said
    assert "preflight verdict" in bad.said
    assert not list(tmp_path.glob("logs/*/*/checkpoints/*"))
    good = command("train.py", *toy)
    assert good.status == 0, good.said
    assert "preflight verdict learns" in good.said
