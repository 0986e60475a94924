"""Rollouts one iteration ahead: what they play, with which weights, and how they end."""

from __future__ import annotations

import threading
import time
from concurrent.futures import wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from coin import CoinEnv
from lightning.pytorch.callbacks import ModelCheckpoint
from local_coin import LocalCoin, make_agent, make_trainer
from runs import Keep, composed, equal_bits, toy_overrides, weights
from safetensors.torch import load_file
from tiny_play import LocalPool

from aem_lightning.algorithms import ClippedLoss
from aem_lightning.modules import AgentModule
from aem_lightning.modules.ahead import check_lag, with_own_adapters
from aem_lightning.modules.journal import RolloutJournal
from aem_lightning.rollout import SlotEngine
from aem_lightning.runner.checks import ConfigError, check_config
from aem_lightning.types import EnvStep


class Watch(Keep):
    """Keeps iterations, the weights before each, and what validations played."""

    def __init__(self) -> None:
        super().__init__()
        self.before: list[dict[str, Any]] = []
        self.validated: list[Any] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.before.append(weights(pl_module))

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.validated.append([turn.response for t in outputs["trajectories"] for turn in t.turns])


class Letters(CoinEnv):
    """Pays by the length of what is said: groups of a random policy are mixed."""

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        text, _, terminated, truncated, info = super().step(action)
        return text, len(action) % 5 / 5, terminated, truncated, info


def its_reward(step: Any, *, malformed: bool) -> float:
    return float(step.reward)


class Late(LocalPool):
    """Environments that answer when nobody expects it."""

    count = 0

    def receive(self) -> dict[str, EnvStep]:
        Late.count += 1
        time.sleep(0.03 * (Late.count % 3))
        return super().receive()


class Slow(LocalPool):
    """Environments that, from the second rollout on, answer when nobody wants it any more."""

    rollouts = 0
    unwanted: threading.Event

    def receive(self) -> dict[str, EnvStep]:
        if self.rollouts > 1:
            assert self.unwanted.wait(100)
        return super().receive()

    def reset(self, requests: Any) -> dict[str, EnvStep]:
        self.rollouts += bool(requests)
        return super().reset(requests)


class Data(LocalCoin):
    """Two tasks an iteration, and an epoch of one; ``kind`` is how its environments answer."""

    def __init__(self, kind: type[LocalPool] = LocalPool) -> None:
        super().__init__(tasks_per_iteration=2, iterations_per_epoch=1, validation_tasks=2)
        self.kind = kind

    @property
    def pool(self) -> Any:
        return self.__dict__.setdefault("_local", self.kind(Letters))

    def close(self) -> None:
        self.__dict__.pop("_local", None)


def lagging(lag: int = 1, **changes: Any) -> AgentModule:
    return make_agent(rewards=its_reward, lag=lag, **changes)


def fit(
    agent: AgentModule, epochs: int = 3, data: Any = None, path: Any = None, **options: Any
) -> Watch:
    watch = Watch()
    trainer = make_trainer(epochs, callbacks=[watch, *options.pop("callbacks", [])], **options)
    trainer.fit(agent, datamodule=data or Data(), ckpt_path=path, weights_only=True)
    return watch


def responses(watch: Watch) -> list[list[str]]:
    return [[u.response for t in done.trajectories for u in t.turns] for done in watch.iterations]


@pytest.fixture(scope="module")
def played() -> tuple[AgentModule, Watch]:
    agent = lagging()
    return agent, fit(agent)


def test_episodes_are_older_or_younger_than_one_update(played: Any) -> None:
    """Each batch has the log-probabilities of the weights before the last update, and no others."""
    agent, watch = played
    assert [done.lag for done in watch.iterations] == [0, 1, 1]
    after = weights(agent)
    for number, done in enumerate(watch.iterations):
        inside = done.batch.response_index >= 0
        rows = [list(range(len(inside)))]
        gaps = []
        for known in watch.before:
            agent.load_state_dict({f"policy.{n}": p for n, p in known.items()}, strict=False)
            logprobs, _ = agent.scores(done.batch, rows)
            gaps.append(float((logprobs - done.batch.sampler_logprobs)[inside].abs().max()))
        assert gaps.index(min(gaps)) == max(0, number - 1)
        assert min(gaps) < 1e-4 < sorted(gaps)[1]
    agent.load_state_dict({f"policy.{n}": p for n, p in after.items()}, strict=False)


def test_the_first_iteration_is_that_of_a_run_without_lag(played: Any) -> None:
    watch = fit(lagging(lag=0), epochs=2, limit_val_batches=0)
    assert responses(watch)[0] == responses(played[1])[0]
    assert watch.iterations[0].lag is None
    assert responses(watch)[1] != responses(played[1])[1]


def test_tokens_of_older_weights_count_as_much_as_others(played: Any) -> None:
    agent, watch = played
    assert isinstance(agent.loss, ClippedLoss)
    assert agent.loss.correction is not None
    assert agent.loss.correction.mode == "truncate"
    first, second, _ = watch.iterations
    assert first.metrics["policy/correction"] == pytest.approx(1.0, abs=1e-4)
    assert first.metrics["policy/sampler_kl"] == pytest.approx(0.0, abs=1e-5)
    assert second.metrics["policy/sampler_kl"] > 1e-4
    assert second.metrics["policy/correction"] != pytest.approx(1.0, abs=1e-4)


def test_bits_hang_on_which_of_two_threads_is_faster(played: Any) -> None:
    agent = lagging()
    late = fit(agent, data=Data(Late))
    assert responses(late) == responses(played[1])
    assert equal_bits(weights(agent), weights(played[0]))


def test_validation_plays_with_older_weights(played: Any) -> None:
    agent, watch = played
    other = lagging(lag=0)
    trainer = make_trainer(callbacks=[kept := Watch()])
    for number, known in enumerate([*watch.before[1:], weights(agent)]):
        other.load_state_dict({f"policy.{n}": p for n, p in known.items()}, strict=False)
        trainer.validate(other, datamodule=Data(), verbose=False)
        assert kept.validated[number] == watch.validated[number]


class EndsBefore(L.Callback):
    """An error before ``iteration``, whose episodes are there already."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if pl_module.iteration == self.iteration:
            wait([pl_module.ahead._playing.played])
            raise KeyError("the power is gone")


@pytest.mark.parametrize("journal", [False, True])
def test_a_run_that_goes_on_plays_its_next_episodes_with_other_weights(
    played: Any, tmp_path: Path, journal: bool
) -> None:
    """They are sampled again by the weights that a checkpoint kept, or read in the journal."""

    def options() -> dict[str, Any]:
        last = ModelCheckpoint(tmp_path / "checkpoints", "last", enable_version_counter=False)
        callbacks = [last, *([RolloutJournal()] if journal else [])]
        kept = {"default_root_dir": tmp_path, "enable_checkpointing": True}
        return {"callbacks": callbacks, **kept}

    if journal:
        broken = options()
        broken["callbacks"].append(EndsBefore(2))
        with pytest.raises(KeyError, match="power"):
            fit(lagging(), **broken)
    else:  # a whole run, which is made longer
        fit(lagging(), epochs=2, **options())
    agent, data = lagging(), Data()
    path = tmp_path / "checkpoints" / "last.ckpt"
    watch = fit(agent, data=data, path=path, **options(), limit_val_batches=0)
    assert [done.lag for done in watch.iterations] == [1]
    assert bool(data.pool.sent) is not journal  # nothing is left to play, or everything
    assert responses(watch) == responses(played[1])[2:]
    assert equal_bits(weights(agent), weights(played[0]))


class StopsAfter(L.Callback):
    """Ends a run in good order, or by an error, after its first iteration."""

    def __init__(self, error: type[BaseException] | None) -> None:
        self.error = error

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if self.error is not None:
            raise self.error("stop")
        trainer.should_stop = True


@pytest.mark.parametrize("error", [None, SystemExit, ValueError])
def test_a_rollout_goes_on_after_the_run_has_ended(error: Any) -> None:
    before, agent = torch.get_num_threads(), lagging()
    assert agent.ahead is not None
    data = Data(Slow)
    data.pool.unwanted = agent.ahead._unwanted
    options: dict[str, Any] = {"callbacks": [StopsAfter(error)], "limit_val_batches": 0}
    if error is None:
        fit(agent, data=data, **options)
    else:
        with pytest.raises(error, match="stop"):
            fit(agent, data=data, **options)
    assert "rollout" not in [thread.name for thread in threading.enumerate()]
    assert "_local" not in data.__dict__  # episodes were open: their environments start anew
    assert torch.get_num_threads() == before
    agent.engine.sync(agent.policy, 9)  # no request is left


class Broken(SlotEngine):
    """Breaks in its second rollout."""

    def sync(self, policy: Any, version: int) -> None:
        super().sync(policy, version)
        self.rollouts = getattr(self, "rollouts", 0) + 1

    def poll(self, wait_all: bool = False, at_least: int = 1) -> list[Any]:
        if self.rollouts == 2:
            raise RuntimeError("the engine is broken")
        return super().poll(wait_all, at_least)


def test_an_error_of_a_rollout_stays_in_its_thread() -> None:
    with pytest.raises(RuntimeError, match="the engine is broken"):
        fit(lagging(engine=Broken(8, 96, 32)), limit_val_batches=0)


class OtherTasks(L.Callback):
    """Chooses what is played when the iteration begins."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any) -> None:
        batch.reverse()


def test_tasks_are_changed_and_others_are_trained_on(caplog: pytest.LogCaptureFixture) -> None:
    watch = fit(lagging(), epochs=2, limit_val_batches=0, callbacks=[OtherTasks()])
    plain = fit(lagging(), epochs=2, limit_val_batches=0)
    for done, other in zip(watch.iterations, plain.iterations, strict=True):
        tasks, others = ([t.task for t in each.trajectories] for each in (done, other))
        assert tasks != others
        assert sorted(tasks, key=str) == sorted(others, key=str)
    assert watch.iterations[1].lag == 1
    assert "played anew" in caplog.text


def test_a_sampler_shares_adapters_or_copies_what_is_frozen(tmp_path: Path) -> None:
    policy = make_agent().policy
    sampler = with_own_adapters(policy)
    trained = set(policy.trainable())
    for (name, one), (_, other) in zip(
        policy.named_parameters(), sampler.named_parameters(), strict=True
    ):
        assert (one.data_ptr() == other.data_ptr()) is (name not in trained)
    assert sampler.causal_lm.config is not policy.causal_lm.config  # its attention is another
    assert set(sampler.trainable()) == trained
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.zero_()
    sampler.save_adapter(tmp_path)  # as engine=vllm asks for it
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == len(trained)
    assert all(weight.any() for weight in saved.values())


def test_half_precision_hangs_on_which_of_two_threads_is_faster() -> None:
    """autocast's cache is that of all threads."""
    found = []
    for data in (Data(), Data(Late)):
        agent = lagging()
        fit(agent, epochs=2, data=data, limit_val_batches=0, precision="bf16-mixed")
        found.append(weights(agent))
    assert equal_bits(*found)


def test_lag_is_taken_where_it_cannot_be(tmp_path: Path) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)

    def trainer(ranks: int, device: torch.device) -> Any:
        return SimpleNamespace(world_size=ranks, strategy=SimpleNamespace(root_device=device))

    engine = SlotEngine()
    check_lag(trainer(1, cpu), engine)
    check_lag(trainer(1, gpu), SimpleNamespace())  # a server's
    with pytest.raises(ValueError, match=r"rollout\.lag=1 on 2 ranks.*trainer\.devices=1"):
        check_lag(trainer(2, cpu), engine)
    with pytest.raises(ValueError, match=r"rollout\.lag=1 .* on cuda:0.*engine=vllm"):
        check_lag(trainer(1, gpu), engine)

    run = [*toy_overrides(tmp_path), f"paths.output_dir={tmp_path}"]
    check_config(composed([*run, "rollout.lag=1"]))
    for wrong in ("2", "-1", "true", "0.5", "null"):
        with pytest.raises(ConfigError, match=r"rollout\.lag=.*rollout\.lag=0, rollout\.lag=1"):
            check_config(composed([*run, f"rollout.lag={wrong}"]))
    with pytest.raises(ConfigError, match=r"rollout\.lag=1 .*horizon_growth.*callbacks=default"):
        check_config(composed([*run, "rollout.lag=1", "callbacks=curriculum"]))
