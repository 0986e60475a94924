"""Parts of one's own: the example package, and every block of docs/extending.md."""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys

import pytest
import torch
from omegaconf import DictConfig
from packages import EXAMPLES, installed
from runs import ROOT, Keep, composed, curves, fit, toy_config

from aem_lightning.rollout import pack
from aem_lightning.runner.build import check_parts, instantiate
from aem_lightning.runner.checks import check_config
from aem_lightning.types import Iteration, RolloutBatch, Task, Trajectory, Turn

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def typed(commands: list[str]) -> list[str]:
    """The overrides of the page's commands, the experiment aside."""
    words = [word for command in commands for word in command.split() if "=" in word]
    return [word for word in words if word != "experiment=quickstart"]


def first_iteration(cfg: DictConfig) -> Iteration:
    """What a run of one iteration did, checked as the command line checks it."""
    keep = Keep()
    check_config(cfg)
    check_parts(cfg)
    fit(cfg, callbacks=[keep])
    (done,) = keep.iterations
    assert done.skipped is None
    return done


def test_the_blocks_of_the_page_do_not_train(toy_model, tmp_path, monkeypatch):
    (tmp_path / "my_parts.py").write_text("\n".join(blocks("python")), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    overrides = typed(blocks("bash")[1:])
    assert len({word for word in overrides if "=my_parts." in word}) == len(blocks("python")) == 5
    cfg = toy_config(tmp_path, toy_model, "iterations=1", "iterations_per_epoch=1", *overrides)
    try:
        done = first_iteration(cfg)
    finally:
        sys.modules.pop("my_parts", None)
    assert done.advantages.min() == pytest.approx(-0.1)
    assert torch.equal(done.alpha, 1 / (1 + done.batch.entropy))
    assert done.batch.ref_logprobs is None
    assert done.metrics["policy/ratio"] == pytest.approx(1, abs=0.2)
    logged = curves(tmp_path)
    assert logged["rollout/longest_response"][0] == done.batch.length.max()
    assert 0 <= next(iter(logged["val/quick_wins"].values())) <= 1
    assert (tmp_path / "checkpoints" / "best.ckpt").is_file()


@pytest.mark.parametrize("kind", [RolloutBatch, Iteration])
def test_a_table_of_the_page_contradicts_the_docstring(kind):
    start = PAGE.index(f"`{kind.__name__}` is ")
    table = re.search(r"(\|.*\n)+", PAGE[start:])
    shapes: dict[str, str] = {}
    for line in table[0].splitlines()[2:]:
        names, shape, _ = (cell.strip() for cell in line.strip("|").split("|"))
        shapes |= dict.fromkeys(re.findall(r"`(\w+)`", names), shape)
    assert shapes.keys() == {field.name for field in dataclasses.fields(kind)}
    told = re.findall(r"``(\w+)`` +(\[.*?\])", kind.__doc__)
    told += re.findall(r"(\w+): .*, (\[.*?\])[;.]", kind.__doc__)
    assert {name: shape for name, shape in shapes.items() if shape} == dict(told)


def played(group, copy, entropy, reward, broken=None):
    turn = Turn("o", (), "r", "a", 0, 1, [-1.0], [entropy], reward=reward)
    return Trajectory(Task("t"), group, copy, [turn], [[1, 2]], infra_error=broken)


def test_the_numbers_of_the_example_are_not_those_by_hand(tmp_path):
    batch = pack(
        [
            played(0, 0, 0.2, 0.0),
            played(0, 1, 0.6, 0.0),
            played(0, 2, 1.0, 10.0),
            played(0, 3, 9.0, 99.0, broken="died"),  # in no statistic
            played(1, 0, 0.5, 10.0),
            played(1, 1, 0.55, 10.0),  # a range under the gate
            played(1, 2, 0.5, 0.0),
        ]
    )
    with installed("own_parts", tmp_path / "site"):
        cfg = composed(["advantage=quantile", "modulation=linear", "paths.output_dir=."])
        estimator, modulation = instantiate(cfg.advantage), instantiate(cfg.modulation)
        best = dataclasses.replace(estimator, quantile=1.0)
        with pytest.raises(ValueError, match=r"advantage\.quantile=2: type a number in \[0, 1\]"):
            dataclasses.replace(estimator, quantile=2)
    assert estimator(batch).tolist() == [0, 0, 10, 0, 0, 0, -10]
    assert best(batch).tolist() == [-10, -10, 0, 0, 0, 0, -10]
    modulated = modulation(batch)
    assert modulated.alpha.tolist() == pytest.approx([1.25, 1.0, 0.75, 1, 1, 1, 1])
    assert modulated.gated == 0.5


def test_the_example_does_not_train_or_has_a_long_file(toy_model, tmp_path):
    (source,) = (EXAMPLES / "own_parts").rglob("*.py")
    assert len(source.read_text(encoding="utf-8").splitlines()) < 60
    with installed("own_parts", tmp_path / "site"):
        own = importlib.import_module("own_parts")
        overrides = typed([blocks("bash")[0]])
        cfg = toy_config(tmp_path, toy_model, "iterations=1", "iterations_per_epoch=1", *overrides)
        cfg.modulation.min_range = 0.0
        done = first_iteration(cfg)
        assert isinstance(instantiate(cfg.modulation), own.LinearModulation)
    assert cfg.modulation.slope == 0.8
    assert not torch.equal(done.alpha, torch.ones_like(done.alpha))
    for group in done.batch.group.unique():
        mine = done.alpha[done.batch.response_group == group]
        assert mine.mean().item() == pytest.approx(1)
        assert mine.min() >= 0.2
