"""Printed commands work in a fresh shell."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import pytest
from runs import composed

from aem_lightning.runner.build import plain
from aem_lightning.runner.next_steps import after_training, after_warm_start, command


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A virtual environment's python, in a folder with a blank, which nothing activates."""
    path = tmp_path / "a place" / ".venv" / "bin" / "python"
    path.parent.mkdir(parents=True)
    path.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(path))
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("PATH", os.defpath)
    monkeypatch.delenv("AEM_LIGHTNING_ROOT", raising=False)
    return path


def test_a_printed_command_needs_an_activated_environment(
    python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shlex.split(command("eval.py")) == [str(python), "eval.py"]
    monkeypatch.chdir(python.parents[2])
    assert command("eval.py", "ckpt_path=a b") == ".venv/bin/python eval.py 'ckpt_path=a b'"
    other = python.parents[2] / "other"
    other.mkdir()
    (other / "python").symlink_to(sys.executable)  # one base, another environment
    monkeypatch.setenv("PATH", str(other))
    assert command("eval.py") == ".venv/bin/python eval.py"
    monkeypatch.setenv("PATH", str(python.parent))
    assert command("eval.py") == "python eval.py"


def test_the_printed_evaluation_looks_for_the_data_elsewhere(
    python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(python.parent))
    usual = composed(["experiment=quickstart"])
    line, curves = after_training(usual, Path("last.ckpt"))
    assert line == "python eval.py ckpt_path=last.ckpt"
    assert curves == "python -m tensorboard.main --logdir logs"
    moved = composed(["paths.root_dir=/a b", "paths.data_dir=/a b/more"])
    (line, _) = after_training(moved, Path("/a b/last.ckpt"))
    assert shlex.split(line)[2:] == [
        "paths.root_dir=/a b",
        "paths.data_dir=/a b/more",
        "ckpt_path=/a b/last.ckpt",
    ]
    found = composed(shlex.split(line)[2:], "eval")
    assert found.paths.data_dir == moved.paths.data_dir
    assert found.ckpt_path == "/a b/last.ckpt"
    assert after_warm_start(Path("model")) == ["python train.py policy.model=model"]


@pytest.mark.parametrize("experiment", ["quickstart", "webshop_quickstart", "swe_quickstart"])
def test_a_whole_run_takes_what_a_fast_one_has_made(experiment: str) -> None:
    places = (f"experiment={experiment}", "paths.output_dir=.")
    whole, fast = composed([*places]), composed([*places, "debug=fast"])
    settings = [cfg.policy.warm_start for cfg in (whole, fast)]
    assert settings[1].demonstrations * settings[1].epochs < 100
    assert settings[0] != settings[1], "or they would share a folder"
    made = [(str(cfg.datamodule.root), plain(cfg.datamodule.generate)) for cfg in (whole, fast)]
    assert (made[0][0] == made[1][0]) == (made[0][1] == made[1][1])
    if experiment == "quickstart":
        assert sum(made[1][1]["sizes"].values()) == 12
    if experiment == "swe_quickstart":
        assert made[1][1]["count"] == 12
