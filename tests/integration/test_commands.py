"""The real commands on the real ALFWorld engine, everything shrunk."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Command
from peft import PeftModel
from runs import COMMAND_ENVIRONMENT, ROOT, SMALL, process
from transformers import AutoModelForCausalLM

HEADLINE = (
    "experiment=alfworld_aem",
    "policy=tiny",
    "datamodule=alfworld_generated",
    "datamodule.generate.sizes={train: 6, valid_seen: 3, valid_unseen: 3}",
    "datamodule.workers=1",
    *SMALL,
    "policy.warm_start.demonstrations=6",
    "policy.warm_start.epochs=2",
    "policy.warm_start.max_turns=12",
    "iterations=2",
    "iterations_per_epoch=1",
    "tasks_per_iteration=2",
    "group_size=2",
    "max_turns=3",
    "max_new_tokens=12",
    "concurrency=12",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("headline")


@pytest.fixture(scope="module")
def first_run(root: Path) -> subprocess.CompletedProcess[str]:
    """The headline command, in a process of its own, as a person types it."""
    return process("train.py", *HEADLINE, f"paths.root_dir={root}")


def typed(line: str) -> list[str]:
    """The words of a printed command, the interpreter by its whole path."""
    python, *words = shlex.split(line)
    return [str(Path(shutil.which(python) or "").absolute()), *words]


def summary_of(root: Path) -> tuple[Path, dict[str, Any]]:
    """The newest run, and its summary."""
    newest = max(root.glob("logs/alfworld_aem/*/summary.json"))
    return newest.parent, json.loads(newest.read_text())


def test_the_headline_does_not_train_offline(
    first_run: subprocess.CompletedProcess[str], root: Path
) -> None:
    assert first_run.returncode == 0, first_run.stdout + first_run.stderr
    folder, summary = summary_of(root)
    assert summary["iterations"] == 2
    for when in ("success_before", "success_after"):
        result = summary[when]
        assert 0 <= result["low"] <= result["rate"] <= result["high"] <= 1
        assert result["episodes"] == 6
        assert sum(part["episodes"] for part in result["by_type"].values()) == 6
    assert list(summary["seconds"]) == [
        "tasks",
        "warm_start",
        "evaluation_before",
        "training",
        "evaluation_after",
    ]
    assert Path(summary["paths"]["checkpoint"]).is_file()
    assert [typed(line) for line in summary["next"]] == [
        [
            sys.executable,
            "eval.py",
            f"paths.root_dir={root}",
            f"ckpt_path={summary['paths']['checkpoint']}",
        ],
        [sys.executable, "-m", "tensorboard.main", "--logdir", f"{root}/logs"],
    ]
    assert Path(summary["paths"]["run"]) == folder.absolute()


def test_the_terminal_shows_what_nobody_can_mend(
    first_run: subprocess.CompletedProcess[str],
) -> None:
    assert first_run.stderr == ""
    assert "Warning" not in first_run.stdout
    lines = first_run.stdout.splitlines()
    assert len([line for line in lines if "train: 6 games" in line]) == 1


def test_evaluation_leaves_games_out(
    first_run: subprocess.CompletedProcess[str], root: Path, command: Command
) -> None:
    ended = command("eval.py", "ckpt_path=last", f"paths.root_dir={root}")
    assert ended.status == 0, ended.said
    (path,) = root.glob("logs/eval/*/evaluation.json")
    report = json.loads(path.read_text())
    assert report["iteration"] == 2
    assert report["checkpoint"] == summary_of(root)[1]["paths"]["checkpoint"]
    assert report["success"]["episodes"] == 6
    assert {split: part["episodes"] for split, part in report["by_split"].items()} == {
        "valid_seen": 3,
        "valid_unseen": 3,
    }
    assert len({(episode["split"], episode["task"]) for episode in report["episodes"]}) == 6
    after = summary_of(root)[1]["success_after"]
    assert report["success"] == after, "the same weights, games and seed"
    (printed,) = re.findall("to see the episodes: (.*)", ended.said)
    bare = {"PATH": os.defpath, "PYTHONPATH": COMMAND_ENVIRONMENT["PYTHONPATH"]}
    shown = subprocess.run(
        ["sh", "-c", printed], cwd=ROOT, env=bare, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    assert "6 episodes" in shown.stdout


def test_a_second_run_starts_warm_again(
    first_run: subprocess.CompletedProcess[str], root: Path, command: Command
) -> None:
    folders = {p: p.stat().st_mtime_ns for p in root.glob("data/warm_start/*/warm_start.json")}
    assert len(folders) == 1
    small = (f"paths.root_dir={root}", "evaluate=false", "iterations=1")
    ended = command("train.py", *HEADLINE, *small)
    assert ended.status == 0, ended.said
    assert "expert play" not in ended.said
    assert "Games made" not in ended.said
    again = {p: p.stat().st_mtime_ns for p in root.glob("data/warm_start/*/warm_start.json")}
    assert again == folders


def test_the_adapter_does_not_load_with_peft(
    first_run: subprocess.CompletedProcess[str], root: Path
) -> None:
    folder, summary = summary_of(root)
    (base,) = (path.parent for path in root.glob("data/warm_start/*/warm_start.json"))
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), folder / "adapter"
    )
    checkpoint = torch.load(summary["paths"]["checkpoint"], weights_only=True)["state_dict"]
    loaded = {
        f"policy.causal_lm.{name}": p for name, p in model.base_model.model.named_parameters()
    }
    assert checkpoint
    for name, value in checkpoint.items():
        torch.testing.assert_close(loaded[name].detach(), value, rtol=0, atol=0)


def test_the_warm_start_of_a_model_folder_leaves_no_model(
    first_run: subprocess.CompletedProcess[str],
    root: Path,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (base,) = (path.parent for path in root.glob("data/warm_start/*/warm_start.json"))
    (games,) = root.glob("data/alfworld_generated/*")
    monkeypatch.setenv("ALFWORLD_DATA", str(games))
    ended = command(
        "train.py",
        "experiment=alfworld_warm_start",
        f"policy.model={base}",
        "policy.lora.r=4",
        "policy.warm_start.demonstrations=4",
        "policy.gradient_checkpointing=false",
        "datamodule.workers=1",
        "max_turns=12",
        "max_new_tokens=12",
        f"paths.root_dir={tmp_path}",
    )
    assert ended.status == 0, ended.said
    (path,) = tmp_path.glob("logs/alfworld_warm_start/*/summary.json")
    summary = json.loads(path.read_text())
    model = summary["paths"]["model"]
    (line,) = summary["next"]
    words = typed(line)
    assert words[:3] == [sys.executable, str(ROOT / "train.py"), "experiment=alfworld_aem"]
    assert words[-1] == f"policy.model={model}"
    assert "max_new_tokens=12" in words
    assert AutoModelForCausalLM.from_pretrained(model).config.hidden_size == 32
