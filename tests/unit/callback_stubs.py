"""A stub agent whose iterations are made by hand, and readers of what callbacks wrote."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from aem_lightning.callbacks import AdapterExport, AEMMonitor, StepTime, Transcripts
from aem_lightning.types import Iteration, RolloutBatch, Task, Trajectory, Turn

SECONDS = {"rollout": 4.0, "environment": 3.0, "old_logprobs": 1.0, "update": 5.0}


def turn(number: int) -> Turn:
    observation = f"obs {number} <b>*bold*</b>\n```"
    return Turn(observation, ("look",), "<think>hm</think> look", "look", 0, 0, [-1.0], [0.25])


def make_iteration(index: int, entropy: float = 0.5) -> Iteration:
    """Five responses of four trajectories; the last trajectory is masked and would spoil all."""
    trajectories = [
        Trajectory(Task(f"game-{n}", "pick", "train"), n // 2, n % 2, turns=turns, won=n == 0)
        for n, turns in enumerate([[turn(0), turn(1)], [turn(0)], [turn(0)], [turn(0)]])
    ]
    none = torch.zeros(1, 1)
    batch = RolloutBatch(
        input_ids=none.long(),
        row_length=torch.ones(1, dtype=torch.long),
        response_index=none.long(),
        old_logprobs=none,
        ref_logprobs=None,
        entropies=none,
        trajectory=torch.tensor([0, 0, 1, 2, 3]),
        turn=torch.tensor([0, 1, 0, 0, 0]),
        length=torch.tensor([2, 4, 2, 8, 100]),
        entropy=torch.tensor([entropy, 0.25, 1.0, 0.5, 9.0]),
        surprisal=torch.tensor([2.0, 0.5, 4.0, 4.0, 1.0]),
        reward=torch.zeros(5),
        valid=torch.ones(5, dtype=torch.bool),
        anchor=torch.arange(5),
        group=torch.tensor([0, 0, 1, 1]),
        returns=torch.zeros(4),
        loss_mask=torch.tensor([True, True, True, False]),
        judged=torch.tensor([True, True, True, False]),
    )
    return Iteration(
        index=index,
        trajectories=trajectories,
        batch=batch,
        advantages=torch.tensor([1.0, 1.0, -2.0, 0.0, -50.0]),
        alpha=torch.tensor([1.5, 0.5, 1.25, 1.0, 7.0]),
        gated=0.5,
        seconds=SECONDS,
        metrics={},
    )


class StubPolicy(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))

    def save_adapter(self, path: Path) -> None:
        (path / "adapter_config.json").write_text(json.dumps(self.weight.tolist()))


class StubAgent(pl.LightningModule):
    """Two updates an iteration from the global random streams: a draw by a callback shows."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.policy = StubPolicy()
        self.register_buffer("iterations", torch.tensor(0))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        for _ in range(2):
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            noise = torch.rand(3) + random.random() + np.random.rand()
            self.manual_backward((self.policy.weight * noise).sum())
            optimizer.step()
        index = int(self.iterations)
        self.iterations += 1
        return {"iteration": make_iteration(index, entropy=0.5 + 0.5 * index)}

    def validation_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        return {"trajectories": make_iteration(0).trajectories}

    test_step = validation_step


def ours() -> list[pl.Callback]:
    transcripts = Transcripts(episodes=2, every_n_iterations=2, validation_episodes=1)
    return [AEMMonitor(), StepTime(), transcripts, AdapterExport()]


def make_trainer(
    folder: Path, callbacks: list[pl.Callback], epochs: int = 2, **more: Any
) -> pl.Trainer:
    more.setdefault("logger", TensorBoardLogger(folder, name="tb", version=""))
    return pl.Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        **more,
    )


def two_batches() -> torch.utils.data.DataLoader[Tensor]:
    return torch.utils.data.DataLoader(torch.zeros(2, 1))


def fit(folder: Path, callbacks: list[pl.Callback], epochs: int = 2, **more: Any) -> StubAgent:
    """Two iterations an epoch."""
    pl.seed_everything(7, verbose=False)
    ckpt_path = more.pop("ckpt_path", None)
    agent = StubAgent()
    trainer = make_trainer(folder, callbacks, epochs, **more)
    trainer.fit(agent, two_batches(), two_batches(), ckpt_path=ckpt_path)
    return agent


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tb"), size_guidance={"tensors": 0}).Reload()


def curve(folder: Path, name: str) -> dict[int, float]:
    return {event.step: event.value for event in events(folder).Scalars(name)}


def json_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "transcripts.jsonl").read_text().splitlines()]
