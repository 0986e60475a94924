"""A run that goes on: the iteration decides where, what was typed holds, nothing is lost."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from runs import curves, equal_bits, fit, toy_config, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from aem_lightning.modules import AgentModule
from aem_lightning.modules.resuming import bring_best, keep_typed_options, take_over_callbacks
from aem_lightning.runner.build import build_trainer, plain
from aem_lightning.runner.checks import ConfigError
from aem_lightning.runner.folder import check_free, held
from aem_lightning.runner.resuming import BEFORE, earlier_run
from aem_lightning.runner.training import train

SMALL = (
    *("iterations=5", "iterations_per_epoch=2", "tasks_per_iteration=2", "num_minibatches=2"),
    *("scheduler=linear", "evaluate=false", "datamodule.validation_tasks=2", "optimizer.lr=0.01"),
    *("+callbacks.transcripts.every_n_iterations=1", "logger=tensorboard"),
)


class Watch(L.Callback):
    """Keeps tasks and rate of each iteration; writes a checkpoint, or stops, after some."""

    def __init__(self, save_at: int = -1, to: Path | None = None, stop_at: int = -1) -> None:
        self._save_at, self._to, self._stop_at = save_at, to, stop_at
        self.tasks: dict[int, list[str]] = {}
        self.rates: dict[int, float] = {}
        self.validated: list[int] = []

    def on_train_batch_start(self, trainer: Any, agent: Any, batch: Any, batch_idx: int) -> None:
        self.tasks[agent.iteration] = [task.id for task in batch]
        self.rates[agent.iteration] = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(self, trainer: Any, agent: Any, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or agent.iteration == self._stop_at
        if agent.iteration == self._save_at:
            trainer.save_checkpoint(self._to, weights_only=False)

    def on_validation_end(self, trainer: Any, agent: Any) -> None:
        self.validated.append(agent.iteration)


def play(
    folder: Path, model: str, *overrides: str, watch: Watch | None = None, **more: Any
) -> tuple[AgentModule, Watch]:
    watch = watch or Watch()
    cfg = toy_config(folder, model, *SMALL, *overrides)
    return fit(cfg, callbacks=[watch], **more), watch


@pytest.fixture(scope="module")
def whole(
    toy_model: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, AgentModule, Watch]:
    """A run without a break, and a checkpoint of it in the middle of its second epoch."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, *play(folder, toy_model, watch=Watch(3, folder / "middle.ckpt"))


def test_a_checkpoint_from_inside_an_epoch_repeats_or_skips_something(
    whole: tuple[Path, AgentModule, Watch], toy_model: str, tmp_path: Path
) -> None:
    folder, agent, watch = whole
    assert watch.validated == [2, 4, 5]  # the last epoch has one iteration
    resumed, seen = play(tmp_path, toy_model, ckpt_path=folder / "middle.ckpt")
    assert seen.tasks == {i: watch.tasks[i] for i in (3, 4)}
    assert seen.rates == {i: watch.rates[i] for i in (3, 4)}
    assert seen.validated == [4, 5]
    assert equal_bits(weights(resumed), weights(agent))
    ends = [torch.load(run / "checkpoints" / "last.ckpt") for run in (folder, tmp_path)]
    for part in ("epoch", "global_step", "lr_schedulers"):
        assert ends[0][part] == ends[1][part]
    assert sorted(curves(tmp_path)["policy/lr"]) == [3, 4]
    assert sorted(curves(tmp_path)["val/success_rate"]) == [3, 4]


def test_other_lengths_on_resuming_repeat_or_skip_a_task(
    whole: tuple[Path, AgentModule, Watch], toy_model: str, tmp_path: Path
) -> None:
    _, _, watch = whole
    # Stopped inside its first epoch; then single tasks, in longer epochs.
    play(tmp_path / "a", toy_model, watch=Watch(stop_at=1))
    then = ("tasks_per_iteration=1", "iterations_per_epoch=4", "iterations=6")
    last = tmp_path / "a" / "checkpoints" / "last.ckpt"
    resumed, seen = play(tmp_path / "b", toy_model, *then, ckpt_path=last)
    stream = [task for i in range(1, 4) for task in watch.tasks[i]]
    assert [seen.tasks[i] for i in range(1, 6)] == [[task] for task in stream[:5]]
    assert seen.validated == [4, 6]
    assert (resumed.iteration, resumed.tasks_played) == (6, 7)


def test_what_was_typed_on_resuming_is_not_used(
    whole: tuple[Path, AgentModule, Watch], toy_model: str, tmp_path: Path
) -> None:
    typed = ("optimizer.lr=1e-4", "optimizer.weight_decay=0.3", "+optimizer.betas=[0.5,0.6]")
    length = ("iterations=4", "scheduler.total_iters=8", "scheduler.end_factor=0.5")
    middle = whole[0] / "middle.ckpt"
    resumed, seen = play(tmp_path, toy_model, *typed, *length, ckpt_path=middle)
    assert seen.rates == {3: pytest.approx(1e-4 * (1 - 0.5 * 3 / 8))}
    (optimizer,) = resumed.trainer.optimizers
    (group,) = optimizer.param_groups
    assert (group["weight_decay"], group["betas"]) == (0.3, (0.5, 0.6))
    (updates,) = {int(state["step"]) for state in optimizer.state.values()}
    assert updates == resumed.trainer.global_step > 4  # moments of more than this one iteration


def checkpoint_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    (parameter,) = optimizer.param_groups[0]["params"]
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kind = type(optimizer)
    return {
        "optimizer_states": [optimizer.state_dict()],
        "aem_lightning": {"optimizers": [f"{kind.__module__}.{kind.__qualname__}"]},
    }


@pytest.mark.parametrize(
    ("kind", "options", "word"),
    [
        (torch.optim.AdamW, {"lr": 0.5, "eps": 1e-3}, None),
        (torch.optim.AdamW, {"amsgrad": True}, "optimizer.amsgrad=True"),
        (torch.optim.SGD, {"momentum": 0.9}, "torch.optim.sgd.SGD"),
    ],
)
def test_moments_that_do_not_fit_are_taken_or_lost_silently(
    kind: Any, options: dict[str, Any], word: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = checkpoint_of(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))]))
    parameter = torch.nn.Parameter(torch.zeros(2))
    fresh = kind([parameter], **options)
    keep_typed_options(checkpoint, fresh)
    fresh.load_state_dict(checkpoint["optimizer_states"][0])
    assert {name: fresh.param_groups[0][name] for name in options} == options
    assert bool(fresh.state) == (word is None)
    assert word is None or word in caplog.text
    parameter.grad = torch.ones(2)
    fresh.step()


def test_a_callbacks_old_settings_win_over_those_typed() -> None:
    callbacks = [EarlyStopping("val/success_rate", patience=7), Timer("00:00:10:00")]
    trainer = L.Trainer(callbacks=[*callbacks], accelerator="cpu", logger=False)
    early, timer = (callback.state_key for callback in callbacks)
    states = {early: {"patience": 3, "wait_count": 2}, timer: {"time_elapsed": {"train": 900.0}}}
    take_over_callbacks({"callbacks": states}, trainer)
    assert states == {early: {"patience": 7, "wait_count": 2}, timer: {}}


def test_the_best_checkpoint_stays_behind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    scores = {str(old / name): torch.tensor(score) for name, score in (("a", 0.5), ("b", 0.9))}
    for name in scores:
        Path(name).write_text(name)
    state = {"best_k_models": scores, "dirpath": str(old), "best_model_path": "", "kth_value": 0}
    callback = ModelCheckpoint(new, monitor="x", mode="max", save_top_k=1)
    callback.load_state_dict(bring_best(state, callback, old, copies=True))
    assert callback.best_model_path == callback.kth_best_model_path == str(new / "b")
    assert float(callback.best_model_score) == float(callback.kth_value) == pytest.approx(0.9)
    assert [path.name for path in new.iterdir()] == ["b"]
    (new / "b").write_text("the next one")
    assert (old / "b").read_text() == str(old / "b")
    moved = old.rename(tmp_path / "moved")
    assert bring_best(state, callback, moved, copies=True)["best_model_path"] == str(new / "b")
    assert (new / "b").read_text() == str(old / "b")
    assert not caplog.records
    callback = ModelCheckpoint(new, monitor="x", mode="max")
    callback.load_state_dict(bring_best(state, callback, tmp_path, copies=True))
    assert callback.best_model_score is None
    assert f"{old / 'b'} is gone" in caplog.text


def test_a_run_in_the_same_folder_has_points_twice(tmp_path: Path) -> None:
    cfg = toy_config(tmp_path, None, "logger=[tensorboard,csv]")
    for start, value in ((0, 1.0), (2, 2.0)):
        time.sleep(1.1 * bool(start))  # TensorBoard reads files in the order of their seconds
        loggers = build_trainer(cfg, start).loggers
        for logger in loggers:
            for step in range(start, 4):
                logger.log_metrics({"x": value}, step)
            logger.finalize("success")
    tables = [tmp_path / "csv" / f"metrics{end}.csv" for end in ("", "_before_2")]
    assert [table.read_text().splitlines()[-1] for table in tables] == ["3,2.0", "3,1.0"]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("x")
    assert [(e.step, e.value) for e in events] == [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0)]


def stored(folder: Path, cfg: Any, iteration: int) -> Path:
    path = folder / "checkpoints" / "some.ckpt"
    path.parent.mkdir()
    ours = {"iteration": iteration, "config": plain(cfg)}
    torch.save({"aem_lightning": ours, "state_dict": {}}, path)
    return path


def test_what_a_checkpoint_cannot_change_is_not_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    path = stored(tmp_path, toy_config(tmp_path, None, "policy.lora.r=4"), iteration=3)
    typed = ("policy.lora.r=2", "policy.architecture.hidden_size=64", "iterations=2")
    with pytest.raises(ConfigError) as error:
        earlier_run(toy_config(tmp_path, None, *typed), path)
    for word in (
        "policy.lora.r=2: the weights in ckpt_path=",
        "Type policy.lora.r=4, or start without",
        "Type policy.architecture.hidden_size=32",
        "iterations=2: the run of",
    ):
        assert word in str(error.value)
    cfg = toy_config(tmp_path, None, "optimizer.lr=0.5", "iterations=3", "logger=csv")
    assert earlier_run(cfg, path).iteration == 3
    assert "All of iterations=3 are played" in caplog.text
    told = [r.getMessage() for r in caplog.records if "differ" in r.getMessage()]
    assert told == [
        "settings that differ from the checkpoint's: iterations=3 (was 4), "
        "optimizer.lr=0.5 (was 0.001), scheduler.total_iters=3 (was 4)"
    ]


@pytest.mark.parametrize(
    ("override", "known"), [("optimizer.lr=1", True), ("eval_temperature=0.2", False)]
)
def test_the_first_evaluation_of_other_settings_is_shown(
    override: str, known: bool, tmp_path: Path
) -> None:
    path = stored(tmp_path, toy_config(tmp_path, "model"), iteration=3)
    (tmp_path / BEFORE).write_text('{"rate": 0.5}')
    found = earlier_run(toy_config(tmp_path, "model", override), path).before
    assert found == ({"rate": 0.5} if known else None)


def test_two_runs_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a run"
    with held(folder):
        for take in (lambda: held(folder).__enter__(), lambda: check_free(folder)):
            with pytest.raises(ValueError, match=r"under way \(process \d+ on .*hydra\.run\.dir"):
                take()
        with pytest.raises(ValueError, match="under way"):
            train(toy_config(folder, None, "stage=check"))
        monkeypatch.setenv("LOCAL_RANK", "1")  # another rank of the run
        with held(folder):
            pass
        monkeypatch.delenv("LOCAL_RANK")
    with held(folder):
        pass
