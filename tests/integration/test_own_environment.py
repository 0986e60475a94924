"""A new environment is one Python file and one YAML of a package of its own."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from packages import EXAMPLES, installed
from runs import CONFIGS, SMALL, composed, curves

from aem_lightning.new.__main__ import main
from aem_lightning.runner.build import build_datamodule
from aem_lightning.runner.checks import ConfigError, check_config
from aem_lightning.runner.training import check_only

EXAMPLE = EXAMPLES / "key_and_door"


@pytest.fixture
def example(tmp_path):
    with installed("key_and_door", tmp_path / "site") as folder:
        yield folder


def invalid_rate(folder: Path) -> float:
    """The share of turns without an admissible action in a run's first iteration."""
    logged = curves(folder)
    return logged["rollout/malformed_rate"][0] + logged["rollout/inadmissible_rate"][0]


def sources() -> list[Path]:
    return [path for kind in ("py", "yaml", "toml") for path in EXAMPLE.rglob(f"*.{kind}")]


def test_the_example_is_one_python_file_and_one_yaml_of_under_60_lines():
    assert sorted(path.suffix for path in sources()) == [".py", ".toml", ".yaml"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources())
    assert sum(bool(line.strip()) for line in text.splitlines()) < 60


def test_a_config_of_an_installed_package_is_an_option(example):
    cfg = composed(["datamodule=key_and_door", "tasks_per_iteration=3"])
    assert cfg.datamodule._target_ == "key_and_door.KeyDataModule"
    assert cfg.datamodule.tasks_per_iteration == 3


def test_the_search_path_of_the_command_line_does_without_an_installation(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", ["datamodule=key_and_door", "hydra.searchpath=[pkg://key_and_door]"])
    assert cfg.datamodule._target_ == "key_and_door.KeyDataModule"


def test_a_class_named_on_the_command_line_does_without_a_yaml(example):
    datamodule = build_datamodule(
        composed(["datamodule=custom", "datamodule._target_=key_and_door.KeyDataModule"])
    )
    splits = ("train", *datamodule.evaluation_splits)
    assert [len(datamodule.tasks(split)) for split in splits] == [202, 67, 67]
    assert datamodule.tasks_per_iteration == 16


def test_a_custom_environment_without_a_class_says_what_to_type():
    with pytest.raises(ConfigError, match=r"type datamodule\._target_=my_package\.MyDataModule"):
        check_config(composed(["datamodule=custom"]))


def test_the_stage_check_proves_the_contract_and_trains_nothing(example, tmp_path, command):
    words = ("datamodule=key_and_door", "prompt=plain", "stage=check", f"paths.root_dir={tmp_path}")
    ended = command("train.py", *words)
    assert ended.status == 0, ended.said
    assert "KeyDataModule keeps the contract" in ended.said
    assert "- tasks: train 202, valid_seen 67, valid_unseen 67; none" in ended.said
    assert "- 12 tasks tried, up to 8 turns each: under seed 0" in ended.said
    assert "malformed from inadmissible" in ended.said
    assert "- 200 episodes leave nothing behind" in ended.said
    assert not list(tmp_path.rglob("*.ckpt"))


def test_the_stage_check_ends_with_every_breach_and_no_traceback(example, tmp_path, command):
    words = ("datamodule=key_and_door", "prompt=plain", "stage=check", f"paths.root_dir={tmp_path}")
    spoilt = "prompt.demonstration='I {action}'"
    ended = command("train.py", *words, spoilt)
    assert ended.status == 1
    assert "expected 'take the key', which is admissible" in ended.said
    assert "Traceback" not in ended.said


def test_the_example_trains_with_free_and_with_constrained_actions(example, tmp_path, command):
    words = (
        *("datamodule=key_and_door", "prompt=plain", "policy=tiny", "name=key"),
        *("iterations=2", "iterations_per_epoch=1", "tasks_per_iteration=2", "group_size=4"),
        *("max_turns=6", "max_new_tokens=8", "max_context=256", "memory=transcript"),
        *("datamodule.workers=1", f"paths.root_dir={tmp_path}", "evaluate=false"),
        "datamodule.validation_tasks=2",
        *(*SMALL, "policy.warm_start.epochs=1", "policy.warm_start.demonstrations=24"),
    )
    ended = command("train.py", *words)
    assert ended.status == 0, ended.said
    (summary,) = tmp_path.glob("logs/key/*/summary.json")
    done = json.loads(summary.read_text(encoding="utf-8"))
    assert done["iterations"] == 2
    assert invalid_rate(summary.parent) > 0
    again = ("name=bound", "action=constrained", "iterations=1")
    ended = command("train.py", *words, *again)
    assert ended.status == 0, ended.said
    (summary,) = tmp_path.glob("logs/bound/*/summary.json")
    assert invalid_rate(summary.parent) == 0


# -------------------------------------------------------------------------------------- aem new env


def test_what_aem_new_env_writes_is_an_option_that_keeps_the_contract(tmp_path, caplog, capsys):
    main(["new", "env", "Deep_sea9", "--into", str(tmp_path / "mine")])
    assert (
        "python train.py datamodule=Deep_sea9 prompt=plain stage=check" in capsys.readouterr().out
    )
    with installed("Deep_sea9", tmp_path / "site", tmp_path / "mine") as folder:
        cfg = composed(["datamodule=Deep_sea9", "prompt=plain"])
        assert check_only(cfg, build_datamodule(cfg))["checked"] == "DeepSea9DataModule"
        for name, test in runpy.run_path(str(folder / "tests" / "test_Deep_sea9.py")).items():
            if name.startswith("test"):
                test()
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("my-game", "cannot be the name of a Python package.* e.g. my_game"),
        ("9lives", "cannot be the name .* e.g. lives"),
        ("_hidden", "cannot be the name"),
        ("../escape", "cannot be the name"),
        ("", "cannot be the name .* e.g. my_game"),
        ("straße", "cannot be the name"),
        ("x" * 300, "at most 60 characters"),
        ("class", "a word of Python's"),
        ("match", "a word of Python's"),
        ("json", "import json brings another module already"),
        ("torch", "import torch brings another module already, .*torch"),
        ("webshop", "datamodule=webshop is an option of this project already"),
    ],
)
def test_a_name_that_cannot_be_is_refused_in_words_and_nothing_is_written(name, told, tmp_path):
    with pytest.raises(SystemExit, match=f"aem new env: .*{told}"):
        main(["new", "env", name, "--into", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_left_as_it_is(tmp_path):
    (tmp_path / "game_a").mkdir()
    with pytest.raises(SystemExit, match="is there already, and nothing is overwritten"):
        main(["new", "env", "game_a", "--into", str(tmp_path)])
    assert [*tmp_path.rglob("*")] == [tmp_path / "game_a"]
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="aem new env: "):
        main(["new", "env", "game_b", "--into", str(tmp_path / "file")])
