"""Runs of the real config on the toy environment, in this process: what they leave and return."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from omegaconf import OmegaConf
from runs import built, composed, curves, toy_config
from safetensors.torch import load_file

from aem_lightning.card import ORIGIN, run_card
from aem_lightning.runner import evaluate, train, training
from aem_lightning.runner.build import build_datamodule, build_trainer, warm_start
from aem_lightning.runner.evaluation import _training_config
from aem_lightning.runner.origin import commit_of
from aem_lightning.runner.trainers import _go_on
from aem_lightning.viewer import read_episodes

QUICK = (
    "datamodule._target_=local_coin.LocalCoin",
    "policy.warm_start.demonstrations=16",
    "policy.warm_start.epochs=2",
    "iterations=2",
    "iterations_per_epoch=1",
    "tasks_per_iteration=2",
    "max_turns=2",
    "optimizer.lr=1e-2",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runner")


def config(root, time, *overrides):
    """A run that finds its games and checkpoints below ``root``, as runs of one project do."""
    folder = root / "logs" / "toy" / time
    paths = (f"paths.root_dir={root}", "name=toy")
    return toy_config(folder, None, *QUICK, *paths, *overrides)


def evaluation(root, *overrides):
    output = root / "evaluation"
    output.mkdir(exist_ok=True)
    places = (f"paths.root_dir={root}", f"paths.output_dir={output}")
    return composed([*places, *overrides], "eval")


@pytest.fixture(scope="module")
def first(root):
    """The summary of a first run."""
    return train(config(root, "1"))


def test_a_run_leaves_summary_checkpoint_and_adapter(root, first):
    folder = root / "logs" / "toy" / "1"
    assert json.loads((folder / "summary.json").read_text()) == first
    assert first["iterations"] == 2
    assert first["name"] == "toy"
    for stage in ("success_before", "success_after"):
        result = first[stage]
        assert 0 <= result["low"] <= result["rate"] <= result["high"] <= 1
        assert result["episodes"] == 8
        assert set(result["by_type"]) == {"red", "blue", "green", "white"}
    stages = ["tasks", "warm_start", "evaluation_before", "training", "evaluation_after"]
    assert list(first["seconds"]) == stages
    assert Path(first["paths"]["checkpoint"]).is_file()
    assert (Path(first["paths"]["adapter"]) / "adapter_config.json").is_file()
    assert first["next"][0].endswith(f"ckpt_path={first['paths']['checkpoint']}")


def test_a_card_tells_what_a_run_was_while_it_goes_and_when_it_is_done(root, first, tmp_path):
    folder = root / "logs" / "toy" / "1"
    done = run_card(folder)
    assert (done.name, done.finished, done.seed, done.iterations) == ("toy", True, 0, 2)
    assert done.versions["torch"] == torch.__version__
    assert done.hours == pytest.approx(sum(first["seconds"].values()) / 3600)
    assert done.success["before"].rate == first["success_before"]["rate"]
    assert "rollout" in {cost.label for cost in done.costs}
    for name, text in done.lines().items():
        assert f"| {name} | {text} |" in done.markdown()
    shutil.copy(folder / ORIGIN, tmp_path)
    (tmp_path / "summary.json").write_text('{"half')
    live = run_card(tmp_path)
    assert (live.finished, live.costs, dict(live.success)) == (False, (), {})
    assert (live.name, live.started, live.versions) == ("toy", done.started, done.versions)
    assert 0 <= live.hours < 1
    assert "so far, without results" in live.markdown()
    (tmp_path / "summary.json").write_text('{"seconds": 3}')
    assert run_card(tmp_path).lines() == {}, "another program's"


def test_the_commit_is_of_a_checkout_alone(tmp_path):
    assert commit_of(tmp_path) == {"commit": None, "dirty": None}
    git = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b")
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    clean = commit_of(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", clean["commit"])
    assert clean["dirty"] is False
    (tmp_path / "own_environment.py").touch()
    assert commit_of(tmp_path) == {**clean, "dirty": True}
    inside = tmp_path / "site-packages"
    inside.mkdir()
    assert commit_of(inside)["commit"] is None, "of a repository that it only lies in"


def test_a_second_run_takes_the_warm_start_and_the_first_evaluation_of_the_first(root, first):
    summary = train(config(root, "2", "ckpt_path=last", "iterations=3"))
    assert summary["iterations"] == 3
    assert len(list((root / "data" / "warm_start").iterdir())) == 1
    assert summary["success_before"] == first["success_before"]


def test_the_warm_start_stage_alone_leaves_a_model_to_start_from(root):
    summary = train(config(root, "warm", "stage=warm_start", "policy.warm_start.seed=4"))
    assert Path(summary["paths"]["model"], "config.json").is_file()
    assert summary["warm_start"]["demonstrations"] > 0
    assert summary["paths"]["model"] in summary["next"][0]


def test_an_evaluation_plays_every_task_once_and_leaves_every_episode(root, first, tmp_path):
    output = f"paths.output_dir={tmp_path}"
    report = evaluate(evaluation(root, output, f"ckpt_path={first['paths']['checkpoint']}"))
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written == report
    assert report["iteration"] == 2
    assert set(report["by_split"]) == {"valid_seen", "valid_unseen"}
    tasks = [(episode["split"], episode["task"]) for episode in report["episodes"]]
    assert len(set(tasks)) == len(tasks) == 8
    assert report["success"]["rate"] == sum(e["won"] for e in report["episodes"]) / 8
    assert report["success"] == first["success_after"]
    shown = read_episodes(tmp_path)
    assert {record["stage"] for record in shown} == {"evaluate"}
    assert {record["iteration"] for record in shown} == {report["iteration"]}
    tasks = sorted((record["task"], record["won"]) for record in shown)
    assert tasks == sorted((episode["task"], episode["won"]) for episode in report["episodes"])
    card = run_card(tmp_path)
    assert (card.finished, card.iterations) == (True, 2)
    assert card.success["evaluation"].rate == report["success"]["rate"]
    assert 0 < card.hours < 1


def test_a_table_of_an_earlier_attempt_is_written_over(tmp_path):
    logger, table = CSVLogger(tmp_path, name="csv", version=""), tmp_path / "csv" / "metrics.csv"
    table.parent.mkdir()
    for attempt in ("first", "second"):
        table.write_text(attempt)
        _go_on(logger, 5)
    kept = sorted(file.read_text() for file in table.parent.glob("metrics_before_5*.csv"))
    assert kept == ["first", "second"]


def test_an_evaluation_of_some_splits_at_another_temperature(root, first):
    cfg = evaluation(root, "splits=[valid_seen]", "temperature=0.5", "run=toy")
    report = evaluate(cfg)
    assert list(report["by_split"]) == ["valid_seen"]
    assert report["temperature"] == 0.5
    assert report["success"]["episodes"] == 4


def test_evaluations_that_all_break_end_a_run_and_a_task_that_does_is_not_listed(
    toy_model, tmp_path, caplog, monkeypatch
):
    target = "datamodule._target_=coin.FragileCoinDataModule"
    short = ("iterations=4", "iterations_per_epoch=2", "tasks_per_iteration=8", "group_size=2")
    engines, build = [], training.build_agent

    def keep(*parts):
        engines.append(build(*parts))
        return engines[-1]

    monkeypatch.setattr(training, "build_agent", keep)
    summary = train(toy_config(tmp_path, toy_model, target, *short))
    assert (summary["success_before"], summary["success_after"]) == (None, None)
    assert summary["iterations"] == 4
    stuck = "RuntimeError: the red box is stuck"
    assert json.loads((tmp_path / "summary.json").read_text())["quarantine"] == {
        "train/0": stuck,
        "train/4": stuck,
    }
    found = curves(tmp_path)
    assert found["rollout/infra_errors"] == dict.fromkeys(range(4), 4.0)
    assert found["rollout/quarantined_tasks"] == dict.fromkeys((1, 2, 3), 2.0)
    assert found["val/infra_errors"] == {1: 4.0, 3: 4.0}
    assert "val/success_rate" not in found
    assert "broken by the environment" in caplog.text
    assert caplog.text.count("the last: the sandbox is gone") >= 2
    with pytest.raises(RuntimeError, match="no policy yet"):  # an analysis plays on after it
        engines[0].engine.submit([])


def test_a_context_beyond_the_models_window_is_told(toy_model, tmp_path, caplog):
    for context, told in ((4096, False), (4097, True)):
        with built(toy_config(tmp_path, toy_model, f"max_context={context}")):
            message = "max_context=4097 is more than the model's window of 4096 tokens"
            assert (message in caplog.text) == told


def test_a_callback_or_a_logger_cannot_be_left_out(tmp_path):
    def kinds(*overrides):
        trainer = build_trainer(toy_config(tmp_path, None, *overrides))
        return {type(part).__name__ for part in (*trainer.callbacks, *trainer.loggers)}

    every, none = kinds("logger=[csv,tensorboard]"), kinds("callbacks=null", "logger=null")
    assert {"Transcripts", "ModelCheckpoint", "CSVLogger", "TensorBoardLogger"} <= every
    assert not {"AEMMonitor", "ModelCheckpoint", "TensorBoardLogger"} & none
    assert every - kinds("callbacks.transcripts=null") == {"Transcripts", "CSVLogger"}
    only = kinds("callbacks=null", "logger=null", "+callbacks.mine._target_=lightning.Callback")
    assert only - none == {"Callback"}


def test_an_evaluation_without_a_checkpoint_says_what_to_type(root):
    with pytest.raises(ValueError, match=r"type ckpt_path=/path/to/last\.ckpt"):
        evaluate(evaluation(root, "ckpt_path=null"))


def test_wishes_change_the_stored_config_and_unknown_ones_are_refused(root):
    stored = OmegaConf.to_container(config(root, "1"), resolve=True)
    cfg = evaluation(root, 'overrides=["datamodule.workers=5"]', "seed=9")
    merged = _training_config(cfg, stored)
    assert merged.datamodule.workers == 5
    assert merged.seed == 9
    assert merged.group_size == 4
    assert list(merged.callbacks) == ["progress"]
    misspelt = evaluation(root, 'overrides=["datamodule.wokers=5"]')
    with pytest.raises(ValueError, match=r"datamodule\.wokers=5.*'wokers' is not.*--cfg job"):
        _training_config(misspelt, stored)


def test_a_warm_start_from_a_model_starts_from_other_weights(root, toy_model):
    """Its adapters are trained and merged: every weight that has none is the model's own."""
    where = (f"+policy.warm_start.base={toy_model}", "policy.lora.target_modules=[q_proj]")
    datamodule = build_datamodule(cfg := config(root, "base", "policy.architecture=null", *where))
    try:
        made = load_file(warm_start(cfg, datamodule).folder / "model.safetensors")
    finally:
        datamodule.close()
    base = load_file(Path(toy_model) / "model.safetensors")
    assert made.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], made[name])}
    assert changed == {name for name in base if "q_proj.weight" in name}


def test_a_run_ends_where_validation_says_so_also_after_it_was_resumed(root, first, tmp_path):
    each = ("iterations_per_epoch=1", "evaluate=false", f"paths.log_dir={tmp_path}")
    model = f"policy.model={next((root / 'data' / 'warm_start').iterdir())}"
    early = ("callbacks=early_stop", model, *each)
    enough = "callbacks.early_stop.stopping_threshold=-0.1"
    done = train(config(root, "enough", *early, enough, "iterations=3"))
    assert done["iterations"] == 1
    assert done["stopped"].startswith("Stopping threshold reached: val/success_rate = ")
    assert "ckpt_path" in done["next"][0]
    assert "train.py" not in done["next"][0]  # it would stop again
    stalled = ("callbacks.early_stop.patience=2", "callbacks.early_stop.min_delta=1")
    part = train(config(root, "stalled", *early, *stalled, "iterations=2"))
    assert (part["iterations"], part["stopped"]) == (2, None)
    goes_on = f"ckpt_path={part['paths']['checkpoint']}"
    rest = train(config(root, "stalled", *early, *stalled, "iterations=9", goes_on))
    assert rest["iterations"] == 3
    assert "did not improve in the last 2 records" in rest["stopped"]
