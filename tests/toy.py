"""Callbacks that get in the way of a run."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import torch


class Kill(L.Callback):
    """Kills the process, without a last word, at the start of a given iteration; one rank's."""

    def __init__(self, epoch: int, batch: int, rank: int = 0) -> None:
        self._when = (epoch, batch, rank)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if (trainer.current_epoch, batch_idx, trainer.global_rank) == self._when:
            os.kill(os.getpid(), signal.SIGKILL)


class Stop(L.Callback):
    """Sends SIGTERM in the rollout, or the update, of a given iteration."""

    def __init__(self, iteration: int, stage: str) -> None:
        self._iteration, self._stage = iteration, stage

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if (self._iteration, self._stage) == (pl_module.iteration, "rollout"):
            pl_module.episodes_over = lambda _: os.kill(os.getpid(), signal.SIGTERM)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if (self._iteration, self._stage) == (pl_module.iteration, "update"):
            self._stage = ""  # once: a second signal would end the process
            os.kill(os.getpid(), signal.SIGTERM)


class KeepWeights(L.Callback):
    """Leaves each rank's last weights in ``folder``."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._folder.mkdir(exist_ok=True)
        trained = {name: p.detach().clone() for name, p in pl_module.policy.trainable().items()}
        torch.save(trained, self._folder / f"rank_{trainer.global_rank}.pt")


class MemoryRunsOut(L.Callback):
    """On one rank, a forward pass that holds a few rows finds no memory: once, late in the pass."""

    def __init__(self, rank: int, after: int) -> None:
        self._rank, self._after = rank, after

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.global_rank != self._rank:
            return
        hidden, calls = pl_module.policy.hidden_states, []

        def failing(input_ids: Any, mask: Any, lengths: Any) -> Any:
            if len(lengths) > 1 and torch.is_grad_enabled():
                calls.append(lengths)
                if len(calls) == self._after:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return hidden(input_ids, mask, lengths)

        pl_module.policy.hidden_states = failing
