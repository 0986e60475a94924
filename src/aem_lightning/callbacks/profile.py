"""A profile of a few iterations: a trace to look at, and the largest costs in the log."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch.profiler import ProfilerActivity, profile

from aem_lightning.beats import DONE, LISTENERS
from aem_lightning.callbacks.outputs import iteration_of
from aem_lightning.callbacks.step_time import INSIDE_ROLLOUT, total_seconds

logger = logging.getLogger(__name__)

NAMED = 3  # of the largest costs
ACTIVITIES = (ProfilerActivity.CPU, ProfilerActivity.CUDA)


class Profile(Callback):
    """``profile.json.gz`` of a few iterations on rank zero, and their largest costs in the log.

    The trace is in Chrome's format: open it at https://ui.perfetto.dev. Stages of the iteration are
    spans in it. The first iteration is left out as a warm-up where others follow.

    Of each stage the beginning is recorded: a whole iteration of the paper's size has some twenty
    million events, and no viewer opens them.

    Args:
        iterations: How many to record.
        folder: Where the trace goes; the trainer's ``default_root_dir`` when ``None``.
        decode_steps: Of a rollout; what comes after them is not recorded.
        micro_batches: Of each stage that has some, likewise.
    """

    def __init__(
        self,
        iterations: int = 2,
        folder: str | Path | None = None,
        decode_steps: int = 16,
        micro_batches: int = 2,
    ) -> None:
        self._left = iterations
        self._folder = folder
        self.most = {"decode_step": decode_steps, "micro_batch": micro_batches}
        self._begun: Counter[str] = Counter()  # of the stage under way
        self._profiler: profile | None = None
        self._records = False
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
            self._profiler = profile(activities=ACTIVITIES[: 1 + torch.cuda.is_available()])
            self._profiler.start()
            self._records = True
            LISTENERS.append(self._hear)
        self._hear("iteration")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, *_: Any
    ) -> None:
        """Count the iteration; after the last one wanted, write. What lies between is left out."""
        if self._profiler is None:
            return
        self._record(False)
        self._left -= 1
        if (iteration := iteration_of(outputs)) is not None:
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
        LISTENERS.remove(self._hear)
        profiler.stop()
        path = Path(self._folder or trainer.default_root_dir) / "profile.json.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        logger.info(
            "Profile of the iterations %s, %s of each stage: %s (open it at "
            "https://ui.perfetto.dev).\n  Largest stages: %s\n  Largest operators: %s",
            self._indices,
            " and ".join(f"{most} {name.replace('_', ' ')}s" for name, most in self.most.items()),
            path,
            largest(stage_costs(self._seconds)),
            largest(operator_costs(profiler, self._seconds)),
        )

    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        self.on_train_end(trainer)

    def _hear(self, name: str, count: int = 0) -> None:
        """Pause at a piece of work too many, go on where a stage begins."""
        if name in self.most:
            self._begun[name] += 1
            if self._begun[name] > self.most[name]:
                self._record(False)
        elif self._profiler is not None and name not in DONE:
            self._begun.clear()
            self._record(True)

    def _record(self, wanted: bool) -> None:
        if self._profiler is not None and self._records != wanted:
            self._records = wanted
            self._profiler.toggle_collection_dynamic(wanted, ACTIVITIES)


def stage_costs(seconds: Mapping[str, float]) -> dict[str, float]:
    """Shares of the stages, with the environment told apart from the rollout around it."""
    total = total_seconds(seconds) or 1.0
    apart = dict(seconds)
    if INSIDE_ROLLOUT in apart and "rollout" in apart:
        apart["rollout"] -= apart[INSIDE_ROLLOUT]
    return {stage: value / total for stage, value in apart.items()}


def operator_costs(profiler: profile, stages: Collection[str]) -> dict[str, float]:
    """Shares of own time by operator: on the GPU where there is one, else on the CPU.

    The spans of ``stages`` are none: most of what is in them is not recorded.
    """
    events = [event for event in profiler.key_averages() if event.key not in stages]
    on_gpu = {event.key: float(event.self_device_time_total) for event in events}
    on_cpu = {event.key: float(event.self_cpu_time_total) for event in events}
    costs = on_gpu if sum(on_gpu.values()) > 0 else on_cpu
    total = sum(costs.values()) or 1.0
    return {key: value / total for key, value in costs.items()}


def largest(costs: Mapping[str, float]) -> str:
    """The largest of some shares, in words."""
    ranked = sorted(costs.items(), key=lambda item: -item[1])[:NAMED]
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in ranked)
