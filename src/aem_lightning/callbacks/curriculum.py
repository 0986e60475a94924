"""Curricula: shorter episodes first, and more of the tasks whose groups are mixed."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT

from aem_lightning.callbacks.loggers import log_scalars
from aem_lightning.callbacks.outputs import iteration_of
from aem_lightning.collectives import from_all_ranks, of_each_rank, this_rank
from aem_lightning.types import Iteration, Task

logger = logging.getLogger(__name__)


class HorizonGrowth(Callback):
    """Cuts training episodes after few turns at first, and after all of them later.

    The one kind of callback that acts: it sets the agent's ``rollout.max_turns`` for a training
    step and puts it back after it, so validation plays whole episodes. The horizon is a function of
    the iteration alone, so a resumed run goes on with the right one.

    Args:
        start: Turns of the first iteration; at least 1.
        iterations: Iterations after which the horizon is the run's own ``max_turns``.

    Raises:
        ValueError: A number under 1.
    """

    def __init__(self, start: int, iterations: int) -> None:
        if start < 1 or iterations < 1:
            raise ValueError(
                f"HorizonGrowth: start={start}, iterations={iterations}; both must be at least 1."
            )
        self._start, self._iterations = start, iterations
        self._full: int | None = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set this iteration's horizon."""
        settings: Any = pl_module.rollout
        self._full = settings.max_turns
        turns = horizon(int(pl_module.iteration), self._start, settings.max_turns, self._iterations)  # type: ignore[arg-type]
        pl_module.rollout = replace(settings, max_turns=turns)
        log_scalars(trainer, {"curriculum/max_turns": turns}, step=int(pl_module.iteration))  # type: ignore[arg-type]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, *_: Any
    ) -> None:
        """Put the whole horizon back."""
        settings: Any = pl_module.rollout
        pl_module.rollout = replace(settings, max_turns=self._full)


class TaskWeights(Callback):
    """Plays tasks more often whose groups were mixed: uniform ones teach nothing.

    A ``share`` of an iteration's tasks, drawn anew for each, is replaced by tasks drawn in
    proportion to ``floor`` plus a running mean of the variance of their group's outcome (0 to 1/4
    for wins and losses). A task that was never played has the largest variance. Draws depend on
    ``seed`` and iteration alone, and are over the tasks of all ranks; what was learnt of the tasks
    is gathered over ranks and is part of the checkpoint.

    Args:
        share: Share of the tasks to replace, 0 to 1.
        floor: Weight of a task whose groups are always uniform; > 0.
        memory: Weight of the past in the running mean, 0 to 1.
        seed: Key of the draws.

    Raises:
        ValueError: A number out of range.
    """

    def __init__(
        self, share: float = 0.5, floor: float = 0.02, memory: float = 0.5, seed: int = 0
    ) -> None:
        if not (0 <= share <= 1 and floor > 0 and 0 <= memory < 1):
            raise ValueError(
                f"TaskWeights: share={share}, floor={floor}, memory={memory}; "
                "0 <= share <= 1, floor > 0 and 0 <= memory < 1 are needed."
            )
        self._share, self._floor, self._memory, self._seed = share, floor, memory, seed
        self._variances: dict[str, float] = {}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Replace tasks of the batch, in place."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        chooser = random.Random(f"{self._seed}/{pl_module.iteration}/0")
        everyone = of_each_rank(list(batch))
        first = sum(map(len, everyone[: this_rank()]))
        whole = [task for share in everyone for task in share]
        places = [place for place in range(len(whole)) if chooser.random() < self._share]
        taken = {task.id for place, task in enumerate(whole) if place not in places}
        tasks = [task for task in data.tasks(data.train_split) if task.id not in taken]
        weights = [self._floor + self._variances.get(task.id, 0.25) for task in tasks]
        drawn = draw_weighted(tasks, weights, len(places), chooser)
        for place, task in zip(places, drawn, strict=False):
            whole[place] = task
        batch[:] = whole[first : first + len(batch)]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, *_: Any
    ) -> None:
        """Learn from the groups of all ranks."""
        iteration = iteration_of(outputs)
        if iteration is None:
            return
        for task, variance in variances(from_all_ranks(outcomes(iteration))).items():
            past = self._variances.get(task, variance)
            self._variances[task] = self._memory * past + (1 - self._memory) * variance
        known = self._variances.values()
        metrics = {
            "curriculum/tasks_played": float(len(known)),
            "curriculum/mean_variance": sum(known) / max(1, len(known)),
        }
        log_scalars(trainer, metrics, step=iteration.index)

    def state_dict(self) -> dict[str, Any]:
        """What was learnt of the tasks."""
        return {"variances": dict(self._variances)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with what an earlier run learnt."""
        self._variances = dict(state_dict["variances"])


def horizon(iteration: int, start: int, full: int, iterations: int) -> int:
    """Turns of an iteration's episodes: from ``start`` in equal steps to ``full``.

    ``start + (full - start) * min(1, i / iterations)``, rounded down; never more than ``full``.
    """
    return min(full, start + (full - start) * min(iteration, iterations) // iterations)


def outcomes(iteration: Iteration) -> list[tuple[str, bool]]:
    """The task of every episode that nothing broke, and whether it was won."""
    return [(t.task.id, t.won) for t in iteration.played if t.infra_error is None]


def group_variances(iteration: Iteration) -> dict[str, float]:
    """The variance of the outcome (won or not) over the copies of each task that was played."""
    return variances(outcomes(iteration))


def variances(played: Iterable[tuple[str, bool]]) -> dict[str, float]:
    """The variance of the outcome of each task over some `outcomes`."""
    won_of: dict[str, list[bool]] = {}
    for task, won in played:
        won_of.setdefault(task, []).append(won)
    rates: Mapping[str, float] = {task: sum(won) / len(won) for task, won in won_of.items()}
    return {task: rate * (1 - rate) for task, rate in rates.items()}


def draw_weighted(
    tasks: Sequence[Task], weights: Sequence[float], count: int, chooser: random.Random
) -> list[Task]:
    """``count`` different tasks, each draw in proportion to the weights of those that are left.

    Fewer where there are not so many. Source: the exponential-key method of Efraimidis and
    Spirakis, "Weighted random sampling with a reservoir", 2006.
    """
    keys = [chooser.random() ** (1.0 / weight) for weight in weights]
    order = sorted(range(len(tasks)), key=lambda place: -keys[place])
    return [tasks[place] for place in order[:count]]
