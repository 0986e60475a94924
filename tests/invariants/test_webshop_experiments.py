"""WebShop's experiments are ALFWorld's in another environment, and its quickstart trains."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import SHORT, SMALL, built, composed, equal_bits, weights

PLACE = "paths.output_dir=."
# What a benchmark brings; all else is the estimator's and the paper's.
OWN = {"name", "datamodule", "prompt", "rewards", "max_turns", "max_context"}
OWN |= {"engine"}  # its rows are max_context long


@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "ppo"])
def test_an_algorithm_is_set_otherwise_than_for_alfworld(algorithm: str) -> None:
    alfworld, webshop = (
        composed([f"experiment={benchmark}", f"algorithm={algorithm}", PLACE])
        for benchmark in ("alfworld", "webshop")
    )
    assert {key for key in webshop if webshop[key] != alfworld[key]} <= OWN


def test_the_papers_settings_have_changed() -> None:
    cfg = composed(["experiment=webshop", PLACE])
    paper = {
        "iterations": 150,
        "tasks_per_iteration": 16,
        "group_size": 8,
        "max_turns": 15,
        "history_length": 2,
        "max_new_tokens": 512,
        "temperature": 1.0,
        "eval_temperature": 0.4,
    }
    assert {key: cfg[key] for key in paper} == paper
    assert cfg.max_context == 4096 + cfg.max_new_tokens
    assert (cfg.rewards.success, cfg.rewards.environment) == (10.0, 0.0)
    assert cfg.rewards.malformed == cfg.rewards.inadmissible == -0.1
    assert (cfg.datamodule.splits, cfg.datamodule.environment.observation) == ("original", "text")


def test_the_quickstart_does_not_train(tmp_path: Path) -> None:
    cfg = composed(
        [
            "experiment=webshop_quickstart",
            f"paths.root_dir={tmp_path}",
            f"paths.output_dir={tmp_path}",
            *SMALL,
            *SHORT,
            "datamodule.generate.products=48",
            "datamodule.splits={test:[0,4],train:[4,null]}",
            "datamodule.workers=1",
            "policy.warm_start.epochs=2",
            "policy.warm_start.demonstrations=32",
            "iterations=2",
            "iterations_per_epoch=2",
            "max_context=768",
            "max_new_tokens=12",
            "rewards.inadmissible=-0.1",  # tells the episodes of a group apart, won or not
            "callbacks=null",
            "logger=null",
        ]
    )
    with built(cfg) as (trainer, module, datamodule):
        before = weights(module)
        trainer.fit(module, datamodule=datamodule)
        assert not equal_bits(before, weights(module))
        assert "val/success_rate" in trainer.callback_metrics
