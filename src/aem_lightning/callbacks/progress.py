"""How far a run is: a bar on a terminal; lines in the log, for everyone else.

Lightning's own bars count batches, and an iteration is a batch. What takes the time is episodes.
"""

from __future__ import annotations

import contextlib
import logging
import statistics
import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch.utils.data import DataLoader
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from aem_lightning.callbacks.outputs import iteration_of

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0
BAR = "{desc}: {n_fmt} of {total_fmt} {unit} |{bar}| {elapsed}, {remaining} left{postfix}"


class Meter:
    """A count on its way to a total: a bar on a terminal, else a line of the log now and then.

    What is logged while a bar stands goes above it. Use it as a context, or `close` it.

    Args:
        what: What is under way.
        total: Where the count ends, as far as is known; it grows where more is counted.
        unit: What is counted.
    """

    def __init__(self, what: str, total: int, unit: str = "episodes") -> None:
        self._what, self._total, self._unit = what, total, unit
        self._count = 0
        self._said = time.monotonic()
        self._open = contextlib.ExitStack()
        self._bar: tqdm | None = None
        if sys.stdout.isatty():
            self._open.enter_context(logging_redirect_tqdm())
            bar = tqdm(
                total=total,
                desc=what,
                unit=unit,
                leave=False,
                file=sys.stdout,
                dynamic_ncols=True,
                bar_format=BAR,
            )
            self._bar = self._open.enter_context(bar)

    def add(self, count: int = 1, note: str = "") -> None:
        """Count on; ``note`` stands behind the count."""
        self._count += count
        self._total = max(self._total, self._count)
        if self._bar is not None:
            self._bar.total = self._total
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._said >= SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            text = f"{self._what}: {self._count} of {self._total} {self._unit}"
            log.info("%s", f"{text}, {note}" if note else text)

    def close(self) -> None:
        """Take the bar away."""
        self._open.close()

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Progress(Callback):
    """Episodes while they are played, and a line for each iteration and validation.

    ``iteration 12/150: success 43.8 %, entropy 0.412, KL 0.0031, 31 s, 1.2 h left``. The time left
    is what iterations and validations of this process took, times those that are still to come.
    Rank zero speaks, of its own episodes; rates are over all ranks.
    """

    def __init__(self) -> None:
        self._meter: Meter | None = None
        self._began = 0.0
        self._iterations: list[float] = []
        self._validations: list[float] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the module say when episodes are over."""
        agent: Any = pl_module
        agent.episodes_over = self._count

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin an iteration."""
        agent: Any = pl_module
        left = _iterations_left(trainer, agent.iteration, batch_idx)
        number = f"{agent.iteration + 1}/{agent.iteration + left}"
        self._begin(trainer, f"iteration {number}", len(batch) * agent.rollout.group_size)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Say what the iteration came to."""
        self._end(self._iterations)
        iteration = iteration_of(outputs)
        if iteration is None or not trainer.is_global_zero:
            return
        left = _iterations_left(trainer, iteration.index, batch_idx) - 1
        shown = trainer.callback_metrics
        parts = [f"success {100 * shown['success']:.1f} %", f"entropy {shown['entropy']:.3f}"]
        if shown["success"].isnan():  # nothing to judge
            parts.clear()
        if "policy/approx_kl" in iteration.metrics:
            parts.append(f"KL {iteration.metrics['policy/approx_kl']:.4f}")
        parts += [duration(self._iterations[-1]), f"{duration(self._left(trainer, left))} left"]
        if iteration.skipped is not None:
            broken = all(trajectory.infra_error for trajectory in iteration.played)
            # Of any other reason LearningWatch speaks, once.
            parts.append(f"no update: {iteration.skipped}" if broken else "no update")
        number = iteration.index + 1
        log.info("iteration %d/%d: %s", number, number + left, ", ".join(parts))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a validation."""
        self._begin(trainer, "validation", _tasks_of(trainer.val_dataloaders))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what the validation came to."""
        self._end(self._validations)
        found = trainer.callback_metrics
        rate = found.get("val/success_rate")
        if trainer.is_global_zero and rate is not None and not rate.isnan():
            agent: Any = pl_module
            log.info(
                "validation after iteration %d: success %.1f %% of %d, %s",
                agent.iteration,
                100 * rate,
                found["val/episodes"],
                duration(self._validations[-1]),
            )

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin an evaluation."""
        repeats = getattr(pl_module, "repeats", 1)
        self._begin(trainer, "evaluation", repeats * _tasks_of(trainer.test_dataloaders))

    def on_test_end(self, *_: Any) -> None:
        """Take the bar of the evaluation away."""
        self._end([])

    def on_exception(self, *_: Any) -> None:
        self._end([])

    def _begin(self, trainer: Trainer, what: str, episodes: int) -> None:
        self._began = time.monotonic()
        if trainer.is_global_zero:
            self._meter = Meter(what, episodes)

    def _end(self, seconds: list[float]) -> None:
        seconds.append(time.monotonic() - self._began)
        if self._meter is not None:
            self._meter.close()
            self._meter = None

    def _count(self, episodes: int) -> None:
        if self._meter is not None:
            self._meter.add(episodes)

    def _left(self, trainer: Trainer, iterations: int) -> float:
        """Seconds that ``iterations`` more, and the validations among and after them, will take."""
        validations = (trainer.max_epochs or 0) - trainer.current_epoch
        each = statistics.fmean(self._validations) if self._validations else 0.0
        return iterations * statistics.fmean(self._iterations) + validations * each


def duration(seconds: float) -> str:
    """Seconds for people, in the unit that suits them."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _iterations_left(trainer: Trainer, iteration: int, batch_idx: int) -> int:
    """Iterations from ``iteration``, that of ``batch_idx``, on to the end of the run."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if getattr(data, "iterations", None) is not None:
        return int(data.iterations - iteration)
    epochs = (trainer.max_epochs or 0) - trainer.current_epoch
    return int(epochs * trainer.num_training_batches) - batch_idx


def _tasks_of(loaders: Any) -> int:
    """Tasks that ``loaders`` hold on this rank: a loader, or one for each split."""
    given = [loaders] if isinstance(loaders, DataLoader) else loaders
    tasks: list[Any] = [loader.dataset for loader in given]
    return sum(map(len, tasks))
