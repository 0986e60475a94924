"""Bad input through the real command line: one clear message, status 1, no traceback."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import Command
from runs import toy_overrides
from safetensors.torch import load_file, save_file


@pytest.fixture
def train(command: Command) -> Command:
    return partial(command, "train.py")


@pytest.fixture
def toy(toy_model: str, tmp_path: Path) -> list[str]:
    """A good command, of a second."""
    few = ["iterations=1", "iterations_per_epoch=1", "evaluate=false"]
    return [*toy_overrides(tmp_path, toy_model), *few]


def test_an_unknown_key_is_not_explained(train: Command, toy: list[str]) -> None:
    ended = train(*toy, "group_sise=4")
    ended.assert_clear("group_sise=4", "Did you mean group_size?", "python train.py --cfg job")
    train(*toy, "optimizer.lrr=4").assert_clear("optimizer.lrr=4", "Did you mean optimizer.lr")


def test_an_unknown_option_is_not_explained(train: Command, toy: list[str]) -> None:
    train(*toy, "modulation=foo").assert_clear("modulation=foo", "Allowed: aem, custom, empg")
    train("experiment=quickstrat").assert_clear("experiment=quickstrat", "quickstart")
    train("experiment=webshop_ppo").assert_clear("type experiment=webshop algorithm=ppo modul")


def test_empg_is_lost_without_a_word(train: Command, toy: list[str]) -> None:
    ended = train(*toy, "algorithm=empg", "modulation=aem")
    ended.assert_clear("algorithm=empg is a modulation of GRPO", "type modulation=empg_aem")


def test_an_unknown_key_of_a_file_is_ignored(
    train: Command, toy: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "own" / "experiment"
    folder.mkdir(parents=True)
    defaults = "# @package _global_\ndefaults:\n  - quickstart\n"
    (folder / "mine.yaml").write_text(f"{defaults}group_sise: 2\n", encoding="utf-8")
    search = next(i for i, word in enumerate(toy) if word.startswith("hydra.searchpath="))
    toy[search] = toy[search].replace("[", f"[file://{folder.parent},")
    toy[0] = "experiment=mine"
    train(*toy).assert_clear("group_sise: a file of this config", "Did you mean group_size?")
    used = "heat: 1.0\ntemperature: ${heat}\n"
    (folder / "mine.yaml").write_text(defaults + used, encoding="utf-8")
    assert train(*toy, "+mine.own=1").status == 0


def test_config_problems_are_told_one_at_a_time(train: Command, toy: list[str]) -> None:
    ended = train(*toy, "memory=foo", "tasks_per_iteration=0", "temperature=0", "stage=x")
    ended.assert_clear(
        "memory='foo'",
        "memory=window, memory=transcript",
        "tasks_per_iteration=0",
        "temperature=0",
        "stage=train",
    )


def test_a_group_of_one_or_an_override_twice_is_taken_and_no_traceback_kept(
    train: Command, toy: list[str], tmp_path: Path
) -> None:
    ended = train(*toy, "group_size=1")
    ended.assert_clear("group_size=1 is too small for GRPO", "at least 2", "Type group_size=8")
    assert "group_size is given more than once (4, 1): the last counts" in ended.said
    (log,) = tmp_path.glob("logs/*/*/error.log")
    assert "Traceback" in log.read_text()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("group_size=1", "Type group_size=8"),
        ("optimizer.lr=-1", "Given: optimizer.lr=-1"),
        ("modulation.min_range=-1", "modulation.min_range=-1"),
        ("rewards.success=nan", "rewards.success=nan"),
        ("+policy.lora.rank=4", "policy.lora.rank: there is no such key. Allowed: r, alpha"),
        ("+policy.warm_start.epoch=4", "policy.warm_start.epoch: there is no such key."),
        ("+policy.architecture.width=4", "policy.architecture.width: there is no such key."),
        ("policy.dtype=float31", "policy.dtype='float31' is unknown; allowed: auto, float32"),
        ("policy.chat_template=/no/such.jinja", "policy.chat_template=/no/such.jinja: there is no"),
    ],
)
def test_a_wrong_value_is_told_after_the_minutes_of_a_warm_start(
    train: Command, tmp_path: Path, wrong: str, told: str
) -> None:
    ended = train(*toy_overrides(tmp_path), wrong)
    ended.assert_clear(told)
    assert not (tmp_path / "data").exists()


def test_a_diverged_warm_start_is_kept_for_the_next_run(train: Command, tmp_path: Path) -> None:
    few = ("policy.warm_start.demonstrations=8", "policy.warm_start.epochs=4")
    ended = train(*toy_overrides(tmp_path), *few, "policy.warm_start.lr=1e30")
    ended.assert_clear("loss of the warm start is nan", "a lower policy.warm_start.lr=")
    assert not list(tmp_path.glob("data/warm_start/*"))


def test_a_prompt_that_does_not_fit_is_cut(train: Command, toy: list[str]) -> None:
    ended = train(*toy, "max_context=14")
    ended.assert_clear("tokens; with max_new_tokens=6", "max_context=14", "Type max_context=")


def test_a_model_without_a_chat_template_is_used(
    train: Command, toy: list[str], toy_model: str, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(toy_model, bare)
    (bare / "chat_template.jinja").unlink()
    ended = train(*toy, f"policy.model={bare}")
    ended.assert_clear(str(bare), "has no chat template", "policy.chat_template=")


def test_nan_weights_are_played_with(
    train: Command, toy: list[str], toy_model: str, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(toy_model, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    ended = train(*toy, f"policy.model={broken}")
    ended.assert_clear("logits are not finite", "policy.model=", "model.norm.weight")


def test_a_missing_checkpoint_starts_a_new_run(train: Command, toy: list[str]) -> None:
    ended = train(*toy, "ckpt_path=/nowhere/last.ckpt")
    ended.assert_clear("ckpt_path=/nowhere/last.ckpt", "no such file", "ckpt_path=last")
    ended = train(*toy, "ckpt_path=last")
    ended.assert_clear("ckpt_path=last", "has a checkpoint yet")


def test_a_broken_checkpoint_is_told_late(train: Command, toy: list[str], tmp_path: Path) -> None:
    assert train(*toy).status == 0
    (whole,) = tmp_path.glob("logs/*/*/checkpoints/last.ckpt")
    half, foreign, other = (tmp_path / name for name in ("half.ckpt", "text.ckpt", "other.ckpt"))
    half.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    foreign.write_text("not a checkpoint")
    torch.save({"state_dict": {}}, other)
    for path in (half, foreign, other):
        train(*toy, f"ckpt_path={path}").assert_clear(str(path), "no checkpoint of a training run")
    assert len(list(tmp_path.glob("logs/*/*/checkpoints"))) == 1


def test_the_headline_without_games_says_something_else(
    train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path / "none"))
    ended = train("experiment=alfworld_aem", f"paths.root_dir={tmp_path}")
    ended.assert_clear(
        str(tmp_path / "none"),
        f"ALFWORLD_DATA={tmp_path / 'none'} alfworld-download",
        "datamodule=alfworld_generated",
    )


def test_the_headline_without_the_model_says_something_else(
    train: Command, alfworld_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALFWORLD_DATA", str(alfworld_root))
    ended = train("experiment=alfworld_aem", f"paths.root_dir={tmp_path}")
    ended.assert_clear(
        "Qwen/Qwen2.5-1.5B-Instruct",
        "hf download Qwen/Qwen2.5-1.5B-Instruct",
        "policy.model=/path/to/folder",
        "policy=tiny",
    )


def test_an_empty_split_is_trained_on(
    train: Command, alfworld_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "games"
    shutil.copytree(alfworld_root, root)
    shutil.rmtree(root / "json_2.1.1" / "valid_unseen")
    (root / "json_2.1.1" / "valid_unseen").mkdir()
    monkeypatch.setenv("ALFWORLD_DATA", str(root))
    ended = train("experiment=alfworld_aem", "policy=tiny", f"paths.root_dir={tmp_path}")
    ended.assert_clear("valid_unseen", "no playable game", "datamodule=alfworld_generated")


def test_an_unknown_task_type_is_not_explained(
    train: Command, alfworld_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALFWORLD_DATA", str(alfworld_root))
    ended = train(
        *("experiment=alfworld_aem", "policy=tiny", f"paths.root_dir={tmp_path}"),
        "datamodule.task_types=[fly]",
    )
    ended.assert_clear("task_types=['fly']", "pick_and_place_simple")


def test_eval_of_nothing_says_something_else(command: Command, tmp_path: Path) -> None:
    run = partial(command, "eval.py", f"paths.root_dir={tmp_path}")
    run().assert_clear("ckpt_path=last", "has a checkpoint yet")
    run("ckpt_path=null").assert_clear("ckpt_path=null", "type ckpt_path=")
    run("sed=1").assert_clear("sed=1", "Did you mean seed?", "python eval.py --cfg job")
