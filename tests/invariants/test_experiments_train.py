"""Every algorithm with and without AEM, shrunk to the toy environment, trains the tiny policy."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from runs import CONFIGS, ROOT, SHORT, SMALL, Keep, built, composed, equal_bits, weights

from aem_lightning.runner.checks import ConfigError, check_config
from aem_lightning.types import Iteration

ALGORITHMS = sorted(path.stem for path in (CONFIGS / "algorithm").glob("*.yaml"))
# The headline as it is, but for what is played, who plays, and how much.
SHRUNK = (
    "experiment=alfworld",
    "datamodule=coin",
    f"hydra.searchpath=[file://{ROOT / 'tests' / 'configs'}]",
    "prompt=plain",
    "policy=tiny",
    "trainer=default",
    *SMALL,
    *SHORT,
    "iterations=2",
    "iterations_per_epoch=2",
    "memory=transcript",
    "max_turns=2",
    "callbacks=null",
    "logger=null",
    "+trainer.limit_val_batches=0",
    "num_minibatches=2",
    "optimizer.lr=1e-2",
)


OPTIONS = (
    ("loss=adaptive_entropy",),
    ("loss=clip_cov", "loss.covariance.low=0", "loss.covariance.ratio=0.1"),
    ("loss.entropy_coef=0.001",),
    ("loss=kl_cov",),
    ("loss=truncated_is", "loss.correction.level=sequence", "loss.correction.mode=mask"),
    ("modulation.direction=reversed",),
    ("modulation.direction=shuffled",),
    ("modulation.scope=anchor_state", "anchor_similarity=0.8"),
    ("algorithm=graphgpo", "anchor_by=admissible_actions"),
    ("modulation.scope=trajectory", "modulation.mean=token"),
    ("modulation.tokens=action",),
    ("modulation.proxy=relative_surprisal",),
    ("modulation=repo_r", "filter=variance"),
    ("advantage.statistics=step",),
    (
        "callbacks=curriculum",
        "callbacks.horizon_growth.start=1",
        "~callbacks.best_checkpoint",
        "~callbacks.last_checkpoint",
    ),
)


def trained(folder: Path, model: str, *overrides: str) -> list[Iteration]:
    """The updates of a short run; its weights have moved and its metrics are finite."""
    places = [f"policy.model={model}", f"paths.root_dir={folder}", f"paths.output_dir={folder}"]
    cfg = composed([*SHRUNK, *places, *overrides])
    for part in (cfg.modulation, cfg.modulation.get("then")):
        if part and "min_range" in part:
            part.min_range = 0.0
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
    return updates


def refusal(words: list[str]) -> str | None:
    """Why a config is refused before anything is made."""
    try:
        check_config(composed(words))
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_algorithm_does_not_train(algorithm: str, toy_model: str, tmp_path: Path) -> None:
    modulation = "empg_aem" if algorithm == "empg" else "aem"
    words = (f"algorithm={algorithm}", f"modulation={modulation}")
    for done in trained(tmp_path, toy_model, *words):
        assert not torch.equal(done.alpha, torch.ones_like(done.alpha))


@pytest.mark.soak
@pytest.mark.parametrize("loss", ["clipped", "cispo", "dppo"])
@pytest.mark.parametrize("modulation", ["none", "aem", "empg", "repo_r"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_combination_trains_or_is_refused_with_a_reason(
    algorithm: str, modulation: str, loss: str, toy_model: str, tmp_path: Path
) -> None:
    words = [f"algorithm={algorithm}", f"modulation={modulation}"]
    if algorithm not in ("cispo", "dppo"):  # they are losses
        words.append(f"loss={loss}")
    # No person may type that one, which would be the reason for all of them.
    typed = [word for word in SHRUNK if "limit_val_batches" not in word]
    why = refusal([*typed, *words, f"paths.output_dir={tmp_path}"])
    if why is None:
        assert trained(tmp_path, toy_model, *words, "iterations=1", "iterations_per_epoch=1")
    else:
        assert {algorithm, modulation} & {"empg", "ppo"} or loss != "clipped", why
        assert "type " in why


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options[0])
def test_an_option_does_not_train(options: tuple[str, ...], toy_model: str, tmp_path: Path) -> None:
    assert trained(tmp_path, toy_model, *options)
