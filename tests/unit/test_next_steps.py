"""Printed commands work in a fresh shell."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from runs import composed

from aem_lightning.runner.build import plain
from aem_lightning.runner.next_steps import (
    after_training,
    after_warm_start,
    command,
    override,
    to_continue,
)


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


def pasted(line: str) -> list[str]:
    """What a shell makes of the words behind ``python <script>``."""
    shell = ["sh", "-c", f"set -- {line}; printf '%s\\0' \"$@\""]
    said = subprocess.run(shell, capture_output=True, check=True, text=True).stdout
    return said.split("\0")[2:-1]


FOLDERS = ("it's a=[1e-4],b", 'say "x" ${x} $HOME', "~{a}(b);c#&*?!é\n", "back\\")


@pytest.mark.parametrize("name", FOLDERS)
def test_a_printed_command_breaks_below_a_folder_of_that_name(name: str, python: Path) -> None:
    root = f"/tmp/{name}/"
    escaped = override("paths.root_dir", root)
    cfg = composed([escaped, "seed=3", "datamodule.workers=7"])
    assert cfg.paths.root_dir == root
    checkpoint = Path(root) / "last.ckpt"
    found = composed(pasted(after_training(cfg, checkpoint)[0]), "eval")
    assert (found.paths.root_dir, found.ckpt_path, found.seed) == (root, str(checkpoint), 3)
    (line,) = after_warm_start(checkpoint.parent, cfg)
    assert composed(pasted(line)).policy.model == str(checkpoint.parent)
    found = composed(pasted(to_continue(cfg, checkpoint)))
    assert (found.ckpt_path, found.paths.root_dir) == (str(checkpoint), root)
    assert found.datamodule.workers == 7


@pytest.mark.parametrize("text", ["123", "null", "1e5", "a,b", " x ", "", "x\\${y}", "plain/path"])
def test_hydra_reads_a_value_as_another_one(text: str) -> None:
    parsed = OverridesParser.create().parse_override(override("key", text))
    assert not parsed.is_sweep_override()
    assert OmegaConf.create({"key": parsed.value()}).key == text


def test_what_a_config_from_python_has_of_its_own_is_dropped() -> None:
    given = ["experiment=swe_quickstart", "stage=warm_start", "memory=window", "~prompt.turn"]
    cfg = composed([*given, "++prompt.mine=[1,{a: b c}]", "callbacks.transcripts=null"])
    (line,) = after_warm_start(Path("model"), cfg)
    found = composed(pasted(line))
    assert (found.stage, found.policy.model) == ("train", "model")
    found.stage, found.policy.model = cfg.stage, cfg.policy.model
    raw = [OmegaConf.to_container(each, resolve=False) for each in (found, cfg)]
    assert raw[0] == raw[1]


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
