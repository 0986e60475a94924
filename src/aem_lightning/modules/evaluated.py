"""How an agent is evaluated: it plays tasks, and learns nothing from them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch

from aem_lightning.metrics import EpisodeMetrics
from aem_lightning.modules.policy import Policy
from aem_lightning.modules.settings import RolloutSettings
from aem_lightning.rollout import Collector, RolloutEngine, make_groups
from aem_lightning.types import Task, Trajectory


class EvaluatedModule(L.LightningModule):
    """The validation and test steps of an agent.

    Args:
        task_types: What results are broken down by.

    Attributes:
        tested: The episodes of the test steps.
        repeats: Episodes of each task.
        validation_metrics: Of the validation under way.
    """

    policy: Policy
    engine: RolloutEngine
    rollout: RolloutSettings
    seed: int
    iteration: int

    def __init__(self, task_types: Sequence[str] = ()) -> None:
        super().__init__()
        self.tested: list[Trajectory] = []
        self.repeats = 1
        self.validation_metrics = EpisodeMetrics(task_types)

    @abstractmethod
    def collector(
        self, temperature: float, seed: tuple[object, ...], pool: Any = None
    ) -> Collector:
        """What plays episodes with the engine's policy."""

    def play(self, tasks: Sequence[Task]) -> list[Trajectory]:
        """``repeats`` episodes of every task; sampling depends on seed, task and copy alone."""
        collector = self.collector(self.rollout.eval_temperature, ("evaluation", self.seed))
        return collector.collect(make_groups(tasks, self.repeats), seed=self.seed)

    def on_validation_epoch_start(self) -> None:
        with self.trainer.precision_plugin.forward_context():  # as in the steps, which play
            self.engine.sync(self.policy, self.iteration)

    def validation_step(self, batch: list[Task], batch_idx: int) -> dict[str, list[Trajectory]]:
        trajectories = self.play(batch)
        self.validation_metrics.update(trajectories)
        return {"trajectories": trajectories}

    def on_validation_epoch_end(self) -> None:
        values = self.validation_metrics.compute()
        self.validation_metrics.reset()
        self.log_dict({f"val/{name}": value for name, value in values.items()}, prog_bar=False)
        success = values.get("success_rate")
        if success is None:  # a curve has a gap there, but what monitors it needs a value
            success = torch.tensor(torch.nan)
            self.log("val/success_rate", success, logger=False)
        self.log("val", success, prog_bar=True, logger=False)

    on_test_epoch_start = on_validation_epoch_start

    def test_step(
        self, batch: list[Task], batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, list[Trajectory]]:
        trajectories = self.play(batch)
        self.tested += trajectories
        return {"trajectories": trajectories}
