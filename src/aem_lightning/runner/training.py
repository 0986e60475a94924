"""A training run: games, warm start, evaluation, reinforcement, evaluation, summary."""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from omegaconf import DictConfig

from aem_lightning.collectives import from_all_ranks
from aem_lightning.datamodules import AgentDataModule
from aem_lightning.envs import check_env
from aem_lightning.files import write_atomically
from aem_lightning.metrics import NothingToJudgeError
from aem_lightning.modules import AgentModule, Policy
from aem_lightning.modules.ahead import check_lag
from aem_lightning.runner.build import (
    build_agent,
    build_datamodule,
    build_policy,
    check_parts,
    check_server,
    instantiate,
    warm_start,
)
from aem_lightning.runner.checkpoints import find_checkpoint, read_checkpoint
from aem_lightning.runner.checks import refuse
from aem_lightning.runner.early import check_training
from aem_lightning.runner.evaluation import check_agent, play_all
from aem_lightning.runner.folder import held
from aem_lightning.runner.memory_plan import planned
from aem_lightning.runner.next_steps import after_training, after_warm_start, to_continue
from aem_lightning.runner.origin import write_origin
from aem_lightning.runner.preflight import preflight
from aem_lightning.runner.ranks import first_rank_first
from aem_lightning.runner.report import game_hashes
from aem_lightning.runner.resuming import BEFORE, Earlier, earlier_run
from aem_lightning.runner.several import is_sharded
from aem_lightning.runner.starting import Start
from aem_lightning.runner.stopping import requeued_checkpoint
from aem_lightning.runner.summary import (
    StageClock,
    early_stop,
    forecast_of,
    learning_verdict,
    write_summary,
)
from aem_lightning.runner.trainers import finish
from aem_lightning.runner.trust import remember

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> dict[str, Any]:
    """Run ``cfg``; returns what ``summary.json`` holds."""
    check_training(cfg)
    if cfg.stage != "check":
        cfg = planned(cfg)
    check_parts(cfg)
    if cfg.stage == "train":
        check_server(cfg)
    remember(cfg)
    with held(Path(cfg.paths.output_dir)), ExitStack() as ending:
        checkpoint = find_checkpoint(cfg, cfg.name) or requeued_checkpoint(cfg)
        # Now: a broken file must show before anything is made.
        earlier = None if checkpoint is None else earlier_run(cfg, checkpoint)
        L.seed_everything(cfg.seed, workers=True, verbose=False)
        clock, start = StageClock(), None
        if cfg.stage != "check":
            clock.seconds["tasks"] = 0.0  # the first that is shown, though a policy may come before
            with clock("warm_start"):
                start = Start.of(cfg, earlier.iteration if earlier else 0)
            # The trainer and its module hold each other: keys, values and graphs of one run would
            # be there in the next.
            ending.callback(getattr(start.engine, "release", bool))
            ending.push(partial(finish, start.trainer.loggers))
        with clock("tasks"), first_rank_first("tasks"):
            datamodule = build_datamodule(cfg)
        ending.callback(datamodule.close)
        if start is None:
            return check_only(cfg, datamodule)
        output, games = Path(cfg.paths.output_dir), game_hashes(datamodule)
        write_origin(output, start.trainer, games, name=cfg.name, seed=cfg.seed)
        if cfg.stage == "warm_start":
            return warm_start_only(cfg, datamodule, clock, start.policy)
        return reinforce(cfg, datamodule, clock, start, earlier)


def reinforce(
    cfg: DictConfig,
    datamodule: AgentDataModule,
    clock: StageClock,
    start: Start,
    earlier: Earlier | None,
) -> dict[str, Any]:
    """The reinforcement stage, between two evaluations; ``earlier`` is the run it goes on from."""
    output, trainer = Path(cfg.paths.output_dir), start.trainer
    with clock("warm_start"):
        policy, _ = build_policy(cfg, datamodule, start.policy)
    module = build_agent(cfg, policy, datamodule, start.engine)
    if trainer.world_size > cfg.tasks_per_iteration:
        told = "tasks_per_iteration=%d: of %d ranks so many play, for a group lives on one rank"
        log.warning(told, cfg.tasks_per_iteration, trainer.world_size)
    even = trainer.world_size * -(-cfg.tasks_per_iteration // trainer.world_size)
    if is_sharded(cfg) and even != cfg.tasks_per_iteration:
        refuse(
            [
                f"tasks_per_iteration={cfg.tasks_per_iteration} on {trainer.world_size} ranks of "
                "trainer=fsdp, which meet in every layer and so need equal shares: type "
                f"tasks_per_iteration={even}"
            ]
        )
    if module.ahead is not None:
        check_lag(trainer, module.engine)
    check_agent(trainer, module)
    checkpoint = earlier.checkpoint if earlier else None
    checked = preflight(cfg, trainer, module, datamodule, checkpoint)
    if cfg.preflight == "only":
        return {"name": cfg.name, "preflight": checked}
    before = after = None
    if cfg.evaluate:
        with clock("evaluation_before"):
            known = earlier.before if earlier else None
            before = known or _success(trainer, module, datamodule)
        if trainer.is_global_zero:
            write_atomically(output / BEFORE, json.dumps(before, indent=2))
    with clock("training"):
        trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
    last = output / "checkpoints" / "last.ckpt"
    if trainer.strategy.broadcast(not _is_of(last, module.iteration)):
        # Lightning's callback saves nothing where there was no update since the one before.
        trainer.save_checkpoint(last, weights_only=False)
    next_steps = after_training(cfg, last)
    stopped = None
    if module.iteration < cfg.iterations:
        stopped = early_stop(trainer.callbacks)  # type: ignore[attr-defined]
        if stopped is None:  # it would stop again
            next_steps.insert(0, to_continue(cfg, last))
        told = "Stopped after iteration %d of %d%s"
        log.warning(told, module.iteration, cfg.iterations, f": {stopped}" if stopped else "")
    verdict = learning_verdict(trainer.callbacks)  # type: ignore[attr-defined]
    if cfg.evaluate and not (cfg.strict and verdict):
        with clock("evaluation_after"):
            after = _success(trainer, module, datamodule)
    summary = {
        "name": cfg.name,
        "iterations": module.iteration,
        "seed": cfg.seed,
        "success_before": before,
        "success_after": after,
        "verdict": verdict,
        "stopped": stopped,
        "forecast": forecast_of(trainer.callbacks),  # type: ignore[attr-defined]
        "preflight": checked and checked["verdict"],
        "quarantine": dict(from_all_ranks([*getattr(datamodule.pool, "quarantine", {}).items()])),
        "seconds": clock.seconds,
        "paths": {"run": str(output), "checkpoint": str(last), "adapter": str(output / "adapter")},
        "next": next_steps,
    }
    if trainer.is_global_zero:
        write_summary(output, summary)
    return summary


def _success(
    trainer: L.Trainer, module: AgentModule, datamodule: AgentDataModule
) -> dict[str, Any] | None:
    """Success over the evaluation; ``None``, and the run goes on, where every episode broke."""
    try:
        success: dict[str, Any] = play_all(trainer, module, datamodule)["success"]
    except NothingToJudgeError as error:
        log.warning("%s", error)
        return None
    return success


def warm_start_only(
    cfg: DictConfig, datamodule: AgentDataModule, clock: StageClock, base: Policy | None
) -> dict[str, Any]:
    """The supervised stage alone; its folder is what the next command starts from."""
    with clock("warm_start"):
        done = warm_start(cfg, datamodule, base)
    summary = {
        "name": cfg.name,
        "iterations": 0,
        "seed": cfg.seed,
        "success_before": None,
        "success_after": None,
        "warm_start": dict(done.report),
        "seconds": clock.seconds,
        "paths": {"run": cfg.paths.output_dir, "model": str(done.folder)},
        "next": after_warm_start(done.folder, cfg),
    }
    write_summary(Path(cfg.paths.output_dir), summary)
    return summary


def check_only(cfg: DictConfig, datamodule: AgentDataModule) -> dict[str, Any]:
    """The stage ``check``: the environment's contract is proved, and nothing is trained.

    Raises:
        EnvContractError: Every breach found.
    """
    parts = {name: instantiate(cfg[name]) for name in ("prompt", "rewards")}
    proved = check_env(datamodule, **parts, seed=cfg.seed)
    name = type(datamodule).__name__
    told = "\n- ".join(["", *proved])
    log.info("%s keeps the contract of aem_lightning.envs.TextEnv:%s", name, told)
    return {"name": cfg.name, "checked": name, "proved": proved}


def _is_of(checkpoint: Path, iteration: int) -> bool:
    """Whether the file is there, and was written after that many iterations."""
    if not checkpoint.exists():
        return False
    return bool(read_checkpoint(checkpoint)["aem_lightning"]["iteration"] == iteration)
