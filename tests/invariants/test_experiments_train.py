"""Every experiment of an estimator, shrunk to the toy environment, trains the tiny policy."""

from __future__ import annotations

import math
from pathlib import Path

import lightning as L
import pytest
import torch
from runs import CONFIGS, ROOT, SHORT, SMALL, built, composed, equal_bits, weights

from aem_lightning.types import Iteration

NAMES = sorted(
    path.stem
    for path in (CONFIGS / "experiment").glob("alfworld_*.yaml")
    if path.stem != "alfworld_warm_start"
)
GROUPED = ("grpo", "dapo", "gspo", "rloo", "gigpo", "grpopp", "drgrpo", "empg")
ESTIMATORS = (*GROUPED, "ppo", "reinforcepp")
# The experiment as it is, but for what is played, who plays, and how much.
SHRUNK = (
    "datamodule=coin",
    f"hydra.searchpath=[file://{ROOT / 'tests' / 'configs'}]",
    "prompt=alfworld_plain",
    "policy=tiny",
    "trainer=default",
    *SMALL,
    *SHORT,
    "iterations=2",
    "iterations_per_epoch=2",
    "memory=transcript",
    "max_turns=2",
    "callbacks=none",
    "logger=none",
    "trainer.enable_checkpointing=false",
    "+trainer.limit_val_batches=0",
    "num_minibatches=2",
    "optimizer.lr=1e-2",
)


class Keep(L.Callback):
    """Keeps what training steps return."""

    def __init__(self) -> None:
        self.iterations: list[Iteration] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, *_: object
    ) -> None:
        assert isinstance(outputs, dict)
        self.iterations.append(outputs["iteration"])


def test_an_estimator_has_no_experiment_without_or_with_aem() -> None:
    wanted = {f"alfworld_{name}{end}" for name in ESTIMATORS for end in ("", "_aem")}
    assert set(NAMES) == wanted | {"alfworld_aem"}


@pytest.mark.parametrize("experiment", NAMES)
def test_an_experiment_does_not_train(experiment: str, toy_model: str, tmp_path: Path) -> None:
    places = [f"policy.model={toy_model}", f"paths.root_dir={tmp_path}"]
    cfg = composed([f"experiment={experiment}", *SHRUNK, *places, f"paths.output_dir={tmp_path}"])
    if "min_range" in cfg.modulation:
        cfg.modulation.min_range = 0.0
    with built(cfg) as (trainer, module, datamodule):
        keep = Keep()
        trainer.callbacks.append(keep)
        before = weights(module)
        trainer.fit(module, datamodule=datamodule)
    assert not equal_bits(before, weights(module))
    updates = [done for done in keep.iterations if done.skipped is None]
    assert updates
    for done in updates:
        assert all(math.isfinite(value) for value in done.metrics.values())
        assert done.metrics["policy/grad_norm"] > 0
        assert done.metrics["policy/sampler_gap"] < 1e-3
        assert done.advantages.shape == done.alpha.shape == (done.batch.num_responses,)
        with_aem = experiment.endswith("aem")
        assert torch.equal(done.alpha, torch.ones_like(done.alpha)) != (
            with_aem or experiment == "alfworld_empg"
        )
