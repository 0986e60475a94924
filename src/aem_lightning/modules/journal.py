"""The rollouts since the last checkpoint, kept: a killed run does not play them again."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from aem_lightning.rollout import Collector
from aem_lightning.rollout.journal import recorded

Play = Callable[[tuple[object, ...]], Collector]
# What of a config no rollout depends on, but through the weights.
UNRELATED = {"advantage", "algorithm", "arm", "callbacks", "ckpt_path", "evaluate", "iterations"}
UNRELATED |= {"logger", "loss", "modulation", "name", "optimizer", "paths", "scheduler"}
UNRELATED |= {"profile", "profile_decode_steps", "profile_micro_batches"}


class RolloutJournal(L.Callback):
    """Keeps a journal of every training rollout since the last checkpoint, a file a rank.

    It lies in ``journal/`` beside ``checkpoints/``, of the run that is continued until this one has
    a checkpoint of its own. A rollout whose weights, tasks and settings are those of a journal is
    read from it (`aem_lightning.rollout.journal`). The weights come out the same with it and
    without. So that there is something to go on from, a new run begins with a checkpoint, where
    one is kept as ``last``.
    """

    def __init__(self) -> None:
        self._saved: int | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the beginning."""
        if trainer.ckpt_path is None:
            save_last(trainer, over=False)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let the rollout of this iteration be recorded; drop those before the checkpoint."""
        if not trainer.checkpoint_callbacks:
            return  # nothing to go on from
        agent: Any = pl_module
        if self._saved is not None:
            remove(trainer, before=self._saved)
        folder = self._folder(trainer)

        def keep(play: Play, tasks: list[Any], sampler: Any) -> Play:
            key = fingerprint(agent, tasks, sampler)

            def record(seed: tuple[object, ...]) -> Collector:
                name = "-".join(map(str, (seed[2], trainer.global_rank, *seed[4:])))  # and a round
                return recorded(play(seed), agent.engine, folder / f"{name}.jsonl", f"{key} {seed}")

            return record

        agent.recorded = keep

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Remember the iteration: once the next one begins, the file is complete."""
        agent: Any = pl_module
        self._saved = agent.iteration

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Drop everything. Where no update was made since the checkpoint, Lightning saved none."""
        agent: Any = pl_module
        if self._saved is not None and self._saved < agent.iteration:
            save_last(trainer, over=True)
        if self._saved is not None:
            remove(trainer, before=self._saved)

    def _folder(self, trainer: L.Trainer) -> Path:
        own, *continued = folders(trainer)
        return continued[0] if continued and self._saved is None else own


def save_last(trainer: L.Trainer, over: bool) -> None:
    """Save a checkpoint where a callback keeps the last one; ``over`` an earlier one or not."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.filename == "last":
            path = Path(str(callback.dirpath)) / "last.ckpt"
            if over or not trainer.strategy.broadcast(path.exists()):
                trainer.save_checkpoint(path, weights_only=False)


def folders(trainer: L.Trainer) -> list[Path]:
    """Where this run's journal lies, and that of the run that it continues."""
    found = [Path(trainer.default_root_dir) / "journal"]
    checkpoint = Path(str(trainer.ckpt_path or ""))
    if checkpoint.parent.name == "checkpoints":
        found.append(checkpoint.parents[1] / "journal")
    return found


def remove(trainer: L.Trainer, before: int) -> None:
    """Delete this rank's journals of the iterations ``before`` one, and those of ranks of old."""
    for folder in folders(trainer):
        for path in folder.glob("*-*.*"):
            iteration, rank = path.stem.split("-")[:2]
            if int(iteration) < before and int(rank) % trainer.world_size == trainer.global_rank:
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not there, or not empty
            folder.rmdir()


def fingerprint(agent: Any, tasks: list[Any], sampler: Any) -> str:
    """A hash of all that a rollout depends on: weights, tasks, settings, bit by bit."""
    config = {name: value for name, value in agent.config.items() if name not in UNRELATED}
    parts = [config, repr(agent.rollout), [task.id for task in tasks], torch.__version__]
    text = json.dumps(parts, sort_keys=True, default=repr)
    own = agent.config.get("paths", {}).get("output_dir")  # a continued run may have another folder
    digest = hashlib.blake2b((text.replace(own, "") if own else text).encode())
    for name, weight in sorted(sampler.trainable().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
