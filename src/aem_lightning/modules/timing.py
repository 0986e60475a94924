"""A stopwatch for the stages of a training step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch
from torch.profiler import record_function

from aem_lightning.beats import beat
from aem_lightning.rollout.shortage import in_stage

STAGES = (
    "rollout",
    "environment",
    "old_logprobs",
    "ref_logprobs",
    "advantage",
    "modulation",
    "update",
)


class Stopwatch:
    """Wall seconds by stage.

    On a GPU the stage's kernels are waited for, so that they count where they belong. In a
    profiler's trace a stage is a span. Memory that runs out in one is told by its name, and by the
    settings that ``limits`` it.
    """

    def __init__(self, device: torch.device, **limits: int) -> None:
        self._device = device
        self._limits = limits
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextlib.contextmanager
    def __call__(self, stage: str, rows: int = 0) -> Iterator[None]:
        """Add the time spent inside this context to ``stage``, which passes through ``rows``."""
        beat(stage, rows)
        start = self._now()
        with record_function(stage), in_stage(stage, **self._limits):
            yield
        self.add(stage, self._now() - start)

    def add(self, stage: str, seconds: float) -> None:
        """Add ``seconds`` to ``stage``."""
        self.seconds[stage] += seconds

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
