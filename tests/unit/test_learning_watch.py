"""A run that learns nothing says so once, under the right name."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from callback_stubs import make_iteration
from local_coin import local_data, make_agent, make_trainer
from tiny_play import TAGGED, make_policy

from aem_lightning.callbacks import LearningWatch, TrendWatch
from aem_lightning.callbacks.learning import Verdict, adapter_bits
from aem_lightning.modules import UpdateSettings
from aem_lightning.modules.batching import make_batch
from aem_lightning.rollout import PromptEncoder, RewardShaping, SlotEngine

NEVER = RewardShaping(success=0.0, malformed=0.0, inadmissible=0.0)


class VariedRewards:
    """A random policy hardly ever wins: rewards that differ between the copies of a group."""

    def __call__(self, step, *, malformed):
        self.count = getattr(self, "count", 0) + 1
        return (self.count * 7 % 5) / 5


class Idle(torch.optim.SGD):
    """An optimizer whose step does nothing."""

    def step(self, closure=None):
        return None


class OnceSynced(SlotEngine):
    """An engine that samples for ever from the weights that it was first given."""

    def sync(self, policy, version):
        if self._model is None:
            self.first = SimpleNamespace(causal_lm=copy.deepcopy(policy.causal_lm))
        super().sync(self.first, version)


class NeverForgets(SlotEngine):
    """An engine that uses the new weights on keys and values of the old ones."""

    def sync(self, policy, version):
        if self._model is None:
            super().sync(policy, version)


def watched(iterations, caplog, strict=False, callbacks=(), **parts):
    """The watch after a run, the agent, and how often a verdict was in the log."""
    agent = make_agent(**{"rewards": VariedRewards(), **parts})
    watch = LearningWatch(strict=strict)
    trainer = make_trainer(callbacks=[watch, *callbacks], epochs=iterations, limit_val_batches=0)
    with caplog.at_level(logging.WARNING, "aem_lightning.callbacks"):
        trainer.fit(agent, datamodule=local_data())
    return watch, agent, caplog.text.count("verdict ")


def sgd(lr):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def engine(kind):
    return kind(slots=8, max_length=96, bucket=4)


CASES = {
    "learning_rate_zero": {"optimizer": sgd(0.0)},
    "dead_optimizer": {"optimizer": lambda parameters: Idle(parameters, lr=0.1)},
    "clipped_to_nothing": {
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        "update": UpdateSettings(num_minibatches=2, max_grad_norm=1e-12),
    },
    "stale_sampler": {"engine": OnceSynced, "optimizer": sgd(0.1)},
    "uniform_groups": {"rewards": NEVER},
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_learns_nothing_ends_without_its_name(name, caplog):
    parts = dict(CASES[name])
    if "engine" in parts:
        parts["engine"] = engine(parts["engine"])
    watch, agent, said = watched(14, caplog, strict=True, **parts)
    assert watch.verdict is not None
    assert watch.verdict.name == name
    assert said == 1
    assert agent.iteration == {
        "learning_rate_zero": 1,
        "uniform_groups": 10,
        "stale_sampler": 2,
    }.get(name, 3)


def test_malformed_replies_are_another_name(caplog):
    policy = make_policy(awake=True)
    encoder = PromptEncoder(policy.tokenizer, TAGGED, "transcript")
    watch, agent, said = watched(14, caplog, strict=True, policy=policy, encoder=encoder)
    assert watch.verdict.name == "malformed_replies"
    assert (agent.iteration, said) == (10, 1)
    assert "rollout/malformed_rate" in watch.verdict.text


@pytest.mark.parametrize("lr", [0.5, 1e-3, 1e-5])
def test_a_run_that_learns_is_given_a_name(lr, caplog):
    watch, _, said = watched(11, caplog, optimizer=sgd(lr))
    assert (watch.verdict, said) == (None, 0)


def test_a_warm_up_from_zero_is_given_a_name(caplog):
    def schedule(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, i / 2))

    watch, _, _ = watched(4, caplog, optimizer=sgd(0.1), scheduler=schedule)
    assert watch.verdict is None


def test_a_sampler_with_old_keys_and_values_is_overlooked(caplog):
    made = engine(NeverForgets)
    watch, _, said = watched(6, caplog, optimizer=sgd(1.0), engine=made)
    assert (watch.verdict.name, said) == ("stale_sampler", 1)


def test_a_sampler_at_another_temperature_is_called_stale(caplog):
    class Hot(SlotEngine):
        def submit(self, requests):
            super().submit(
                [replace(r, sampling=replace(r.sampling, temperature=3.0)) for r in requests]
            )

    watch, _, _ = watched(1, caplog, engine=engine(Hot))
    assert watch.verdict.name == "sampler_differs"
    assert "policy/sampler_gap" in watch.verdict.text


def test_a_reference_that_follows_the_policy_is_overlooked(caplog):
    policy = make_policy(awake=True)
    policy.reference = contextlib.nullcontext
    watch, _, _ = watched(3, caplog, policy=policy, optimizer=sgd(0.5))
    assert watch.verdict.name == "reference_moved"


def test_other_ids_than_the_sampled_ones_are_overlooked(caplog, monkeypatch):
    def shifted(*arguments):
        batch = make_batch(*arguments)
        inside = batch.response_index >= 0
        batch.input_ids[inside] = (batch.input_ids[inside] + 1) % 20
        return batch

    monkeypatch.setattr("aem_lightning.modules.agent.make_batch", shifted)
    watch, _, _ = watched(1, caplog)
    assert watch.verdict.name == "wrong_tokens"


def test_a_short_run_without_an_update_has_no_name(caplog):
    watch, agent, said = watched(3, caplog, rewards=NEVER)
    assert (watch.verdict.name, agent.iteration, said) == ("uniform_groups", 3, 1)


def test_a_resumed_run_counts_anew_or_keeps_a_verdict_that_was_mended():
    watch = LearningWatch(patience=3)
    watch._quiet = ["uniform_groups"] * 2
    resumed = LearningWatch(patience=3)
    resumed.load_state_dict(watch.state_dict())
    assert resumed._quiet == ["uniform_groups"] * 2
    assert resumed.verdict is None
    watch.verdict = Verdict("uniform_groups", 7, "why")
    resumed.load_state_dict(watch.state_dict())
    assert resumed.verdict is None
    assert resumed._quiet == []


def test_a_changed_bit_is_overlooked():
    policy = make_policy()
    before = adapter_bits(SimpleNamespace(policy=policy))
    weight = next(p for name, p in policy.trainable().items() if "lora_A" in name)
    with torch.no_grad():
        weight.view(-1)[3] = torch.nextafter(weight.view(-1)[3], torch.tensor(9.0))
    after = adapter_bits(SimpleNamespace(policy=policy))
    assert sum(one != other for one, other in zip(before, after, strict=True)) == 1


def curve(name, values):
    """Iterations whose entropy, KL or length follows ``values``."""
    for index, value in enumerate(values):
        done = make_iteration(index)
        entropy = value if name == "entropy" else 0.5
        done.batch.entropy = torch.full_like(done.batch.entropy, entropy)
        if name == "length":
            done.batch.length = torch.full_like(done.batch.length, value)
        yield replace(done, metrics={"policy/approx_kl": value if name == "kl" else 0.01})


@pytest.mark.parametrize(
    ("name", "values", "said", "panel"),
    [
        ("entropy", [0.5] * 5 + [0.02] * 12, "entropy collapse", "rollout/mixed_groups"),
        ("entropy", [0.5] * 5 + [2.0] * 12, "entropy eruption", "aem/entropy"),
        ("kl", [0.01] * 5 + [0.9] * 12, "KL blow-up", "policy/approx_kl"),
        ("kl", [0.01, math.inf, math.inf], "KL blow-up", "policy/approx_kl"),
        ("length", [10] * 5 + [40] * 12, "growing length", "rollout/response_tokens"),
        ("entropy", [0.5] * 5 + [0.2] * 12, None, ""),
        ("length", [10] * 5 + [20] * 12, None, ""),
    ],
)
def test_a_curve_runs_away_unseen_or_is_told_twice(name, values, said, panel, caplog):
    watch, trainer = TrendWatch(), SimpleNamespace(is_global_zero=True)
    for done in curve(name, values):
        watch.on_train_batch_end(trainer, None, {"iteration": done})
        resumed = TrendWatch()
        resumed.load_state_dict(watch.state_dict())
        watch = resumed
    assert [record.message.partition(" (")[0] for record in caplog.records] == [said] * bool(said)
    assert panel in caplog.text


def test_broken_episodes_are_called_uniform(caplog):
    watch = LearningWatch(patience=2)
    strategy = SimpleNamespace(reduce=lambda counts, reduce_op: counts)
    trainer = SimpleNamespace(optimizers=[], strategy=strategy, world_size=1, is_global_zero=True)
    for index in range(2):
        done = replace(
            make_iteration(index), advantages=torch.zeros(5), skipped="every episode broke: died"
        )
        for trajectory in done.trajectories:
            trajectory.infra_error = "died"
        watch.on_train_batch_end(trainer, None, {"iteration": done})
    assert watch.verdict.name == "no_update"
    assert "every episode broke: died" in watch.verdict.text
