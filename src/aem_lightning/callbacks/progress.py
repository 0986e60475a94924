"""How far a run is: a bar on a terminal; lines in the log, for everyone else.

Lightning's own bars count batches, and an iteration is a batch. What takes the time is episodes,
and then the rows that are scored and learnt from.
"""

from __future__ import annotations

import contextlib
import logging
import os
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch.utils.data import DataLoader
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from aem_lightning.beats import LISTENERS
from aem_lightning.callbacks.outputs import iteration_of
from aem_lightning.types import Trajectory

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0
SECONDS_BETWEEN_LOOKS = 0.5  # of a bar that does not move
BAR = "{desc}: {n_fmt} of {total_fmt} {unit} |{bar}| {elapsed}, {remaining} left{postfix}"

# The stages that pass through rows, in words.
OF_ROWS = {
    "advantage": "values",
    "old_logprobs": "scoring",
    "ref_logprobs": "scoring by the reference",
    "update": "update",
}


class Meter:
    """A count on its way to a total: a bar on a terminal, else a line of the log now and then.

    What is logged while a bar stands goes above it. Use it as a context, or `close` it.

    Args:
        what: What is under way.
        total: Where the count ends, as far as is known; it grows where more is counted.
        unit: What is counted.
        ending: What every sign of life ends with.
    """

    def __init__(self, what: str, total: int, unit: str = "episodes", ending: str = "") -> None:
        self.unit = unit
        self._what, self._total, self._ending = what, total, ending
        self._count = self._won = self._judged = self._tokens = 0
        self._note = ""
        self._began = self._said = time.monotonic()
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
                bar_format=BAR,
                **_size(),
            )
            self._bar = self._open.enter_context(bar)

    def add(self, count: int = 1, note: str = "") -> None:
        """Count on; ``note`` stands behind the count."""
        self._count += count
        self._total = max(self._total, self._count)
        self._note = note
        if self._bar is not None:
            self._bar.total = self._total
            self._bar.set_postfix_str(", ".join(self._known()), refresh=False)
            self._bar.update(count)
        self._show()

    def played(self, episodes: Sequence[Trajectory]) -> None:
        """Count ``episodes``, which have just ended; success is that of all so far."""
        judged = [episode for episode in episodes if episode.infra_error is None]
        self._judged += len(judged)
        self._won += sum(bool(episode.won) for episode in judged)
        self.add(len(episodes))

    def sampled(self, tokens: int) -> None:
        """Count the ``tokens`` of a response; what is shown is their rate so far."""
        self._tokens += tokens
        self._show()

    def close(self) -> None:
        """Take the bar away."""
        self._open.close()

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _show(self) -> None:
        """Look at the bar again, or write a line, where the last time is a while ago."""
        now = time.monotonic()
        if self._bar is not None:
            if now - self._said >= SECONDS_BETWEEN_LOOKS:
                self._said = now
                self._bar.set_postfix_str(", ".join(self._known()))
        elif now - self._said >= SECONDS_BETWEEN_LINES:
            self._said = now
            told = [f"{self._what}: {self._count} of {self._total} {self.unit}", *self._known()]
            if self._count:
                left = (now - self._began) / self._count * (self._total - self._count)
                told.insert(1, f"{duration(left)} left")
            log.info("%s", ", ".join(told))

    def _known(self) -> list[str]:
        """What is known so far, besides the count."""
        seconds = max(time.monotonic() - self._began, 1e-6)
        parts = [f"success {100 * self._won / self._judged:.1f} %"] if self._judged else []
        parts += [f"{self._tokens / seconds:.0f} tokens/s"] if self._tokens else []
        return parts + [part for part in (self._note, self._ending) if part]


class Progress(Callback):
    """What is under way as it goes on, and a line for each iteration and validation.

    Under way are episodes, with success so far and the tokens a second, then the rows that are
    scored, then those of the update. The line:
    ``iteration 12/150: success 43.8 %, entropy 0.412, KL 0.0031, 31 s, 1.2 h left``. The time left
    is what iterations and validations of this process took, times those that are still to come.
    Rank zero speaks, of its own episodes and rows; rates of a line are over all ranks.
    """

    def __init__(self) -> None:
        self._meter: Meter | None = None
        self._what = self._ending = ""  # of the iteration under way
        self._began = 0.0
        self._iterations: list[float] = []
        self._validations: list[float] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the module say when episodes are over, and hear what else gets done."""
        agent: Any = pl_module
        agent.episodes_over = self._played
        if trainer.is_global_zero and self._hear not in LISTENERS:
            LISTENERS.append(self._hear)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop_hearing()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin an iteration."""
        agent: Any = pl_module
        left = _iterations_left(trainer, agent.iteration, batch_idx)
        self._what = f"iteration {agent.iteration + 1}/{agent.iteration + left}"
        if self._iterations:
            self._ending = f"run: {duration(self._left(trainer, left))} left"
        episodes = len(batch) * agent.rollout.group_size
        self._begin(trainer, f"{self._what}, rollout", episodes, self._ending)

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
        self._begin(trainer, "validation", _tasks_of(trainer.val_dataloaders), self._ending)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what the validation came to."""
        self._end(self._validations)
        found = trainer.callback_metrics
        rate = found.get("val/success_rate")
        if trainer.is_global_zero and rate is not None and not rate.isnan():
            agent: Any = pl_module
            parts = [f"success {100 * rate:.1f} % of {found['val/episodes']:.0f}"]
            parts.append(duration(self._validations[-1]))
            if self._iterations:
                left = _iterations_left(trainer, agent.iteration, int(trainer.num_training_batches))
                parts.append(f"{duration(self._left(trainer, left, validated=1))} left")
            log.info("validation after iteration %d: %s", agent.iteration, ", ".join(parts))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin an evaluation."""
        repeats = getattr(pl_module, "repeats", 1)
        self._begin(trainer, "evaluation", repeats * _tasks_of(trainer.test_dataloaders))

    def on_test_end(self, *_: Any) -> None:
        """Take the bar of the evaluation away."""
        self._end([])

    def on_exception(self, *_: Any) -> None:
        self._end([])
        self._stop_hearing()

    def _begin(self, trainer: Trainer, what: str, episodes: int, ending: str = "") -> None:
        self._began = time.monotonic()
        if trainer.is_global_zero:
            self._show(Meter(what, episodes, ending=ending))

    def _end(self, seconds: list[float]) -> None:
        seconds.append(time.monotonic() - self._began)
        self._show(None)
        self._what = ""

    def _show(self, meter: Meter | None) -> None:
        if self._meter is not None:
            self._meter.close()
        self._meter = meter

    def _played(self, episodes: Sequence[Trajectory]) -> None:
        if self._meter is not None and self._meter.unit == "episodes":
            self._meter.played(episodes)

    def _hear(self, name: str, count: int) -> None:
        """A stage of rows begins, rows of it are done, or a response was sampled."""
        meter = self._meter
        if name in OF_ROWS and count and self._what:
            self._show(None)  # before there is another bar
            self._show(Meter(f"{self._what}, {OF_ROWS[name]}", count, "rows", self._ending))
        elif meter is not None and name == "rows" and meter.unit == "rows":
            meter.add(count)
        elif meter is not None and name == "tokens" and meter.unit == "episodes":
            meter.sampled(count)

    def _stop_hearing(self) -> None:
        if self._hear in LISTENERS:
            LISTENERS.remove(self._hear)

    def _left(self, trainer: Trainer, iterations: int, validated: int = 0) -> float:
        """Seconds that ``iterations`` more, and the validations among and after them, will take.

        Of the epoch under way ``validated`` says whether that is over.
        """
        validations = (trainer.max_epochs or 0) - trainer.current_epoch - validated
        each = statistics.fmean(self._validations) if self._validations else 0.0
        return iterations * statistics.fmean(self._iterations) + validations * each


def _size() -> dict[str, Any]:
    """How large a bar may be; a terminal that does not know its size would show none."""
    try:
        is_known = all(os.get_terminal_size(sys.stdout.fileno()))
    except (OSError, ValueError):
        is_known = True  # to tqdm, from the environment
    return {"dynamic_ncols": True} if is_known else {"ncols": 80, "nrows": 24}


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
