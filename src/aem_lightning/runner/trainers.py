"""The Trainer of a run: what it saves and logs, and how it ends."""

from __future__ import annotations

import logging
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import (
    CSVLogger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from lightning.pytorch.strategies.launchers import subprocess_script
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from aem_lightning.callbacks import Profile
from aem_lightning.modules import RolloutJournal, check_dtype
from aem_lightning.runner import ranks
from aem_lightning.runner.broken_batch import BrokenBatch
from aem_lightning.runner.checkpoint_io import SealedCheckpointIO
from aem_lightning.runner.checks import ConfigError, TrainOptions, refuse
from aem_lightning.runner.fsdp import FullySharded
from aem_lightning.runner.parts import made
from aem_lightning.runner.signals import stop_signals
from aem_lightning.runner.stopping import KeepLastIteration

log = logging.getLogger(__name__)


def build_trainer(cfg: DictConfig, start: int = 0) -> L.Trainer:
    """The Trainer, with callbacks and loggers; its epochs come from the number of iterations.

    With ``start``, the iteration at which a run goes on, TensorBoard hides what an interrupted run
    wrote for later ones into the same folder, and a table of that run is kept.
    """
    trainer = make_trainer(cfg)
    for logger in trainer.loggers:
        if start:
            _go_on(logger, start)
        _reach(logger)
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # and no choice of the user's
        trainer.strategy.checkpoint_io = SealedCheckpointIO()
    # Lightning's own watch ends this process too, without a word.
    watch = partial(
        ranks.watch_others, Path(cfg.paths.output_dir), partial(_flush, trainer.loggers)
    )
    subprocess_script._launch_process_observer = watch  # type: ignore[attr-defined]
    if cfg.trainer.accelerator == "auto" and isinstance(trainer.accelerator, CPUAccelerator):
        log.warning("No GPU was found: this run computes on the CPU")
    return trainer


def precision_of(cfg: DictConfig) -> str:
    """What ``trainer.precision`` comes to: ``null`` is bf16-mixed where that is fast."""
    if (given := cfg.trainer.get("precision", "32-true")) is not None:
        return str(given)
    return "32-true" if stored_dtype(cfg, "auto") is torch.float32 else "bf16-mixed"


def stored_dtype(cfg: DictConfig, name: str) -> torch.dtype:
    """What ``policy.dtype=name`` comes to on the device of this run."""
    return check_dtype(name, cfg.trainer.get("accelerator"))


def make_trainer(cfg: DictConfig) -> L.Trainer:
    """The Trainer as its settings have it, whatever run it is for."""
    callbacks, loggers = _named("callbacks", cfg.callbacks), _named("logger", cfg.logger)
    callbacks.append(BrokenBatch())
    if cfg.profile:
        callbacks.append(
            Profile(
                decode_steps=cfg.get("profile_decode_steps", TrainOptions.profile_decode_steps),
                micro_batches=cfg.get("profile_micro_batches", TrainOptions.profile_micro_batches),
            )
        )
    if cfg.get("rollout_journal"):  # earlier checkpoints have no such key
        callbacks.append(RolloutJournal())
    if (signals := stop_signals()) is not None:
        callbacks.append(KeepLastIteration(cfg, signals))
    options = {
        "callbacks": callbacks,
        "logger": loggers,
        "precision": precision_of(cfg),
        # Where none of them saves, Lightning would add a checkpoint of its own.
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "max_epochs": -(-cfg.iterations // cfg.iterations_per_epoch),
        # An epoch may be shorter than others: the last, and the first of a resumed run.
        "reload_dataloaders_every_n_epochs": 1,
    }
    trainer: L.Trainer = made("trainer", cfg.trainer, **options)
    if hasattr(trainer.strategy, "_timeout"):
        seconds = cfg.get("rank_timeout_s", TrainOptions.rank_timeout_s)
        trainer.strategy._timeout = timedelta(seconds=seconds)
    if isinstance(trainer.strategy, FullySharded) and trainer.world_size == 1:
        refuse(
            [
                f"trainer.devices={cfg.trainer.devices}: there is one device here, and "
                "trainer=fsdp shares a policy among several: type trainer=gpu, or of a checkpoint "
                "'overrides=[\"trainer.strategy=auto\"]'"
            ]
        )
    return trainer


def _flush(loggers: list[Any]) -> None:
    for logger in loggers:
        logger.save()


def _reach(logger: Any) -> None:
    """Open what is far away now: after a warm start would be late to hear of a missing password."""
    if not isinstance(logger, WandbLogger | MLFlowLogger):
        return
    is_wandb = isinstance(logger, WandbLogger)
    try:
        _ = logger.experiment
    except Exception as error:  # whatever a service says
        instead = "wandb.offline=true" if is_wandb else "mlflow.tracking_uri=sqlite:///mlflow.db"
        raise ConfigError(
            f"{type(logger).__name__} cannot be opened: {' '.join(str(error).split())} "
            f"To write to this machine alone type logger.{instead}"
        ) from error


def finish(loggers: list[Any], failed: type[BaseException] | None, *_: object) -> None:
    """Close what would go on into the next run of this process; as the exit of a context."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish(exit_code=int(failed is not None))


def _go_on(logger: Any, start: int) -> None:
    """Let a logger of Lightning's go on at iteration ``start`` of the run in its folder."""
    if isinstance(logger, TensorBoardLogger):
        logger._kwargs["purge_step"] = start  # of the SummaryWriter, which is made at first use
    elif isinstance(logger, CSVLogger) and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        table = Path(logger.log_dir) / "metrics.csv"
        if table.is_file():  # it would be deleted
            kept, number = table.with_name(f"metrics_before_{start}.csv"), 1
            while kept.exists():  # of a run that went on from here and was stopped, too
                number += 1
                kept = table.with_name(f"metrics_before_{start}_{number}.csv")
            table.rename(kept)


def _named(group: str, nodes: DictConfig | None) -> list[Any]:
    """What each of ``nodes`` stands for; one that is null was dropped."""
    found = (nodes or {}).items()
    return [made(f"{group}.{name!s}", node) for name, node in found if node is not None]
