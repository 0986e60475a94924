"""The toy environment as a DataModule: a coin lies in one of four boxes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from coin import ACTIONS, BOXES, CoinEnv

from aem_lightning.datamodules import AgentDataModule
from aem_lightning.envs import TextEnv
from aem_lightning.types import Task


class CoinExpert:
    """Opens the box that the hint names, after ``detours`` others."""

    def __init__(self, detours: int) -> None:
        self._detours = detours

    def act(self, observation: str, admissible: Any) -> str:
        if observation.startswith("A coin"):
            self._coin = observation.split()[5]
        if self._detours:
            self._detours -= 1
            return next(action for action in admissible if self._coin not in action)
        return f"open {self._coin} box"


class CoinDataModule(AgentDataModule):
    """``sizes`` tasks in each split."""

    def __init__(self, sizes: dict[str, int] | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.sizes = sizes or {"train": 8, "valid_seen": 4, "valid_unseen": 4}

    def tasks(self, split: str) -> list[Task]:
        return [
            Task(f"{split}/{i}", BOXES[i % len(BOXES)], split) for i in range(self.sizes[split])
        ]

    def env_factory(self) -> Callable[[], TextEnv]:
        return CoinEnv

    def make_expert(self, task: Task, seed: int) -> CoinExpert:
        return CoinExpert(seed % 2)

    def vocabulary(self) -> list[str]:
        return [
            *ACTIONS,
            "A coin glints near the box . You find the coin !",
            "The box is empty . Nothing happens . find the coin",
        ]


class Kill(L.Callback):
    """Kills the process, without a last word, at the start of a given iteration."""

    def __init__(self, epoch: int, batch: int) -> None:
        self._when = (epoch, batch)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if (trainer.current_epoch, batch_idx) == self._when:
            os.kill(os.getpid(), signal.SIGKILL)


class SameSampling(L.Callback):
    """Lets every rank sample as rank 0 does, and leaves each rank's last weights in ``folder``."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        collector = pl_module.collector
        pl_module.collector = lambda temperature, seed: collector(temperature, (*seed[:3], 0))

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
