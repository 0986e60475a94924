"""A training run: games, warm start, evaluation, reinforcement, evaluation, summary."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import lightning as L
from omegaconf import DictConfig

from aem_lightning.datamodules import AgentDataModule
from aem_lightning.envs import check_env
from aem_lightning.runner.build import (
    build_agent,
    build_datamodule,
    build_policy,
    build_trainer,
    check_parts,
    instantiate,
    warm_start,
)
from aem_lightning.runner.checkpoints import find_checkpoint, read_checkpoint
from aem_lightning.runner.early import check_training
from aem_lightning.runner.evaluation import play_all
from aem_lightning.runner.next_steps import after_training, after_warm_start
from aem_lightning.runner.summary import StageClock, write_summary
from aem_lightning.runner.trust import remember

log = logging.getLogger(__name__)

BEFORE = "success_before.json"


def train(cfg: DictConfig) -> dict[str, Any]:
    """Run ``cfg``; returns what ``summary.json`` holds."""
    check_training(cfg)
    check_parts(cfg)
    remember(cfg)
    checkpoint = find_checkpoint(cfg, cfg.name)
    before = _before(checkpoint)  # now: a broken file must show before anything is made
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    clock = StageClock()
    with clock("tasks"):
        datamodule = build_datamodule(cfg)
    try:
        if cfg.stage == "check":
            return check_only(cfg, datamodule)
        if cfg.stage == "warm_start":
            return warm_start_only(cfg, datamodule, clock)
        return reinforce(cfg, datamodule, clock, checkpoint, before)
    finally:
        datamodule.close()


def reinforce(
    cfg: DictConfig,
    datamodule: AgentDataModule,
    clock: StageClock,
    checkpoint: Path | None,
    known: dict[str, Any] | None,
) -> dict[str, Any]:
    """The reinforcement stage, between two evaluations; ``known`` is the first, once made."""
    output = Path(cfg.paths.output_dir)
    with clock("warm_start"):
        policy, _ = build_policy(cfg, datamodule)
    module = build_agent(cfg, policy, datamodule)
    trainer = build_trainer(cfg)
    before = after = None
    if cfg.evaluate:
        with clock("evaluation_before"):
            before = known or play_all(trainer, module, datamodule)["success"]
        (output / BEFORE).write_text(json.dumps(before, indent=2), encoding="utf-8")
    with clock("training"):
        trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
    last = output / "checkpoints" / "last.ckpt"
    if not trainer.strategy.broadcast(last.exists()):
        # Lightning's callback saves nothing before the first update.
        trainer.save_checkpoint(last, weights_only=False)
    if cfg.evaluate:
        with clock("evaluation_after"):
            after = play_all(trainer, module, datamodule)["success"]
    summary = {
        "name": cfg.name,
        "iterations": module.iteration,
        "seed": cfg.seed,
        "success_before": before,
        "success_after": after,
        "seconds": clock.seconds,
        "paths": {"run": str(output), "checkpoint": str(last), "adapter": str(output / "adapter")},
        "next": after_training(cfg, last),
    }
    if trainer.is_global_zero:
        write_summary(output, summary)
    return summary


def warm_start_only(
    cfg: DictConfig, datamodule: AgentDataModule, clock: StageClock
) -> dict[str, Any]:
    """The supervised stage alone; its folder is what the next command starts from."""
    with clock("warm_start"):
        done = warm_start(cfg, datamodule)
    summary = {
        "name": cfg.name,
        "iterations": 0,
        "seed": cfg.seed,
        "success_before": None,
        "success_after": None,
        "warm_start": dict(done.report),
        "seconds": clock.seconds,
        "paths": {"run": cfg.paths.output_dir, "model": str(done.folder)},
        "next": after_warm_start(done.folder),
    }
    write_summary(Path(cfg.paths.output_dir), summary)
    return summary


def check_only(cfg: DictConfig, datamodule: AgentDataModule) -> dict[str, Any]:
    """The stage ``check``: the environment's contract is proved, and nothing is trained.

    Raises:
        EnvContractError: Every breach found.
    """
    check_env(datamodule, prompt=instantiate(cfg.prompt), seed=cfg.seed)
    name = type(datamodule).__name__
    log.info("%s keeps the contract of aem_lightning.envs.TextEnv", name)
    return {"name": cfg.name, "checked": name}


def _before(checkpoint: Path | None) -> dict[str, Any] | None:
    """The first evaluation of the run that ``checkpoint`` continues: it is not played again."""
    if checkpoint is None:
        return None
    stored = read_checkpoint(checkpoint)
    earlier = Path(stored["aem_lightning"]["config"]["paths"]["output_dir"]) / BEFORE
    if not earlier.is_file():
        return None
    found: dict[str, Any] = json.loads(earlier.read_text(encoding="utf-8"))
    return found
