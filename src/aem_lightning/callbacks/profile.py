"""A profile of a few iterations: a trace to look at, and the largest costs in the log."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch.profiler import ProfilerActivity, profile

from aem_lightning.callbacks.outputs import iteration_of
from aem_lightning.callbacks.step_time import INSIDE_ROLLOUT, total_seconds

logger = logging.getLogger(__name__)

NAMED = 3  # of the largest costs


class Profile(Callback):
    """``profile.json.gz`` of a few iterations on rank zero, and their largest costs in the log.

    The trace is in Chrome's format: open it at https://ui.perfetto.dev. Stages of the iteration are
    spans in it. The first iteration is left out as a warm-up where others follow.

    Args:
        iterations: How many to record; a trace grows by some megabytes with each.
        folder: Where the trace goes; the trainer's ``default_root_dir`` when ``None``.
    """

    def __init__(self, iterations: int = 2, folder: str | Path | None = None) -> None:
        self._left = iterations
        self._folder = folder
        self._profiler: profile | None = None
        self._seconds: dict[str, float] = {}
        self._indices: list[int] = []
        self._warm = False

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start recording, before the first iteration after the warm-up."""
        planned = float(trainer.num_training_batches) * (trainer.max_epochs or 1)
        if not self._warm and planned > 1:
            self._warm = True
            return
        if self._profiler is None and self._left > 0 and trainer.is_global_zero:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profiler = profile(activities=activities)
            self._profiler.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, *_: Any
    ) -> None:
        """Count the iteration; after the last one wanted, write."""
        iteration = iteration_of(outputs)
        if self._profiler is None or iteration is None:
            return
        self._left -= 1
        self._indices.append(iteration.index)
        for stage, seconds in iteration.seconds.items():
            self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds
        if self._left == 0:
            self.on_train_end(trainer)

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        """Write what was recorded, also of a run that was short or broke."""
        if self._profiler is None:
            return
        profiler, self._profiler, self._left = self._profiler, None, 0
        profiler.stop()
        path = Path(self._folder or trainer.default_root_dir) / "profile.json.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        logger.info(
            "Profile of the iterations %s: %s (open it at https://ui.perfetto.dev).\n"
            "  Largest stages: %s\n  Largest operators: %s",
            self._indices,
            path,
            largest(stage_costs(self._seconds)),
            largest(operator_costs(profiler, self._seconds)),
        )

    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        self.on_train_end(trainer)


def stage_costs(seconds: Mapping[str, float]) -> dict[str, float]:
    """Shares of the stages, with the environment told apart from the rollout around it."""
    total = total_seconds(seconds) or 1.0
    apart = dict(seconds)
    if INSIDE_ROLLOUT in apart and "rollout" in apart:
        apart["rollout"] -= apart[INSIDE_ROLLOUT]
    return {stage: value / total for stage, value in apart.items()}


def operator_costs(profiler: profile, stages: Mapping[str, float]) -> dict[str, float]:
    """Shares of own time by operator: on the GPU where there is one, else on the CPU.

    What a stage spends outside every operator (Python, waiting) stands under the stage's name.
    """
    events = profiler.key_averages()
    on_gpu = {event.key: float(event.self_device_time_total) for event in events}
    on_cpu = {event.key: float(event.self_cpu_time_total) for event in events}
    costs = on_gpu if sum(on_gpu.values()) > 0 else on_cpu
    total = sum(costs.values()) or 1.0
    names = {stage: f"{stage} outside operators" for stage in stages}
    return {names.get(key, key): value / total for key, value in costs.items()}


def largest(costs: Mapping[str, float]) -> str:
    """The largest of some shares, in words."""
    ranked = sorted(costs.items(), key=lambda item: -item[1])[:NAMED]
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in ranked)
