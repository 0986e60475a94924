"""The contract between an environment and the training loop."""

from __future__ import annotations

import logging
import random
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from aem_lightning.envs import EnvPool, TextEnv, in_worker
from aem_lightning.envs.pool import OnBadAnswer, check_pool_settings
from aem_lightning.types import Count, Natural, Positive, Seed, Task, Tool

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

log = logging.getLogger(__name__)

if TYPE_CHECKING or not in_worker():
    from lightning import LightningDataModule
else:

    class LightningDataModule:
        """Lightning's, where a worker only defines subclasses: it saves it torch and Lightning."""


class TaskSampler:
    """The tasks of an epoch: a pure function of seed, epoch, rank, and where the run goes on.

    So a resumed run sees what it would have seen. Tasks come in passes over the whole split, each
    pass in an order of its own. Iteration ``i`` takes the next ``tasks_per_iteration`` tasks; each
    rank takes its part of them, as large as the others' or smaller by one. Epoch ``e`` is
    iterations ``e * iterations_per_epoch`` and on, of which those before ``start`` and from ``end``
    on are not played.

    Args:
        num_tasks: Tasks of the split.
        tasks_per_iteration: Tasks of one iteration, over all ranks.
        iterations_per_epoch: Iterations of a whole epoch.
        seed: Key of the orders.
        rank: This rank.
        world_size: Number of ranks.
        start: The run's next iteration.
        played: Tasks that were taken before it; ``None``: as many as ``start`` iterations take.
        end: Iterations of the run; ``None``: as many as there are epochs for.
    """

    def __init__(
        self,
        num_tasks: int,
        tasks_per_iteration: int,
        iterations_per_epoch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        start: int = 0,
        played: int | None = None,
        end: int | None = None,
    ) -> None:
        self._num_tasks = num_tasks
        self._per_iteration = tasks_per_iteration
        self._per_epoch = iterations_per_epoch
        self._seed = seed
        first, after = (-(-end * tasks_per_iteration // world_size) for end in (rank, rank + 1))
        self._share = range(first, after)  # of an iteration's tasks
        self._start, self._end = start, end
        # Where iteration 0 would have been, had every iteration taken as many tasks.
        self._origin = 0 if played is None else played - start * tasks_per_iteration
        self._epoch = 0

    @property
    def share(self) -> int:
        """Tasks of one iteration on this rank; 0 where there are more ranks than tasks."""
        return len(self._share)

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self._epoch = epoch

    @property
    def iterations(self) -> range:
        """The iterations of this epoch."""
        first, after = self._epoch * self._per_epoch, (self._epoch + 1) * self._per_epoch
        return range(max(first, self._start), after if self._end is None else min(after, self._end))

    def __len__(self) -> int:
        return len(self.iterations) * self.share

    def __iter__(self) -> Iterator[int]:
        for iteration in self.iterations:
            yield from self.of(iteration)

    def of(self, iteration: int) -> list[int]:
        """The tasks of an iteration on this rank, of any epoch."""
        first = self._origin + iteration * self._per_iteration
        return [self._task(first + place) for place in self._share]

    def _task(self, position: int) -> int:
        passes, place = divmod(position, self._num_tasks)
        order = list(range(self._num_tasks))
        random.Random(f"{self._seed}/{passes}").shuffle(order)
        return order[place]


class AgentDataModule(LightningDataModule):
    """Tasks and their environment; a new environment implements `tasks` and `env_factory`.

    It may share a file with its environment: in a worker process, which imports that file, this
    class stands alone and brings neither torch nor Lightning.

    Args:
        tasks_per_iteration: Tasks of one iteration, over all ranks.
        iterations_per_epoch: Iterations between two validations (and checkpoints).
        validation_tasks: Tasks of the validation during training: a fixed, evenly spaced choice of
            the sorted evaluation tasks.
        evaluation_batch: Tasks that one evaluation step plays.
        evaluation_splits: Splits that an evaluation plays, every task once.
        workers: Environment processes on each rank.
        timeout_s: Seconds after which a worker that does not answer is replaced. A start may be
            idle or compute for so long, however long a busy machine leaves it waiting.
        memory_gb: GB that a worker may allocate before it is replaced; ``None``: all there is.
        pass_environment: Names of environment variables that workers get beside the usual ones,
            among which there is no token and no key.
        on_bad_answer: Where an environment returns what its contract does not allow: ``mask`` the
            episode, or ``stop`` the run.
        seed: Key of the task order.
    """

    train_split = "train"
    iterations: int | None = None  # of the whole run; None: as many as the trainer has epochs for
    keep_groups = True  # a group's copies share a worker; False: they play at the same time

    def __init__(
        self,
        *,
        tasks_per_iteration: Count = 16,
        iterations_per_epoch: Count = 5,
        validation_tasks: Natural = 64,
        evaluation_batch: Count = 128,
        evaluation_splits: Sequence[str] = ("valid_seen", "valid_unseen"),
        workers: Count = 2,
        timeout_s: Positive = 120.0,
        memory_gb: Positive | None = None,
        pass_environment: Sequence[str] = (),
        on_bad_answer: OnBadAnswer = "mask",
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        self.tasks_per_iteration = tasks_per_iteration
        self.iterations_per_epoch = iterations_per_epoch
        self.validation_tasks = validation_tasks
        self.evaluation_batch = evaluation_batch
        self.evaluation_splits = tuple(evaluation_splits)
        self.workers = workers
        self.timeout_s = timeout_s
        self.memory_gb = memory_gb
        self.pass_environment = pass_environment
        self.on_bad_answer = on_bad_answer
        check_pool_settings(**self.pool_settings)
        self.seed = seed
        self._pool: EnvPool | None = None

    @abstractmethod
    def tasks(self, split: str) -> list[Task]:
        """Every task of ``split``, sorted by id."""

    @abstractmethod
    def env_factory(self) -> Callable[[], TextEnv]:
        """A picklable function that makes one environment, in a worker process."""

    def make_expert(self, task: Task, seed: int) -> Any:
        """An `Expert` for ``task``, for the warm start of a model that cannot play yet."""
        raise ValueError(
            f"{type(self).__name__} has no expert, so there is nothing to warm-start from on "
            f"{task.id!r}: implement make_expert(task, seed), or start from a model that plays "
            "already: policy=qwen2_5_1_5b_lora"
        )

    def vocabulary(self) -> list[str]:
        """Texts that hold every word the environment can say: one token each for `policy=tiny`."""
        return []

    def thoughts(self) -> list[str]:
        """The same of its expert's thoughts, for a prompt whose ``demonstration`` has them."""
        return []

    def tools(self) -> list[Tool]:
        """The environment's tools, for ``prompt.action=tool_call``; none: the one ``act(action)``.

        `function_tool` makes them. An environment gets its own words where the tool has some
        (``action``), else the call as JSON.
        """
        return []

    def task_types(self) -> list[str]:
        """The types that results are broken down by, sorted."""
        splits = (self.train_split, *self.evaluation_splits)
        return sorted({task.type for split in splits for task in self.tasks(split)})

    @property
    def pool_settings(self) -> dict[str, Any]:
        """How a pool treats its workers."""
        names = ("timeout_s", "memory_gb", "pass_environment", "on_bad_answer")
        return {name: getattr(self, name) for name in names}

    @property
    def pool(self) -> EnvPool:
        """The environment pool; its workers start at the first reset."""
        if self._pool is None:
            self._pool = EnvPool(
                self.env_factory(),
                workers=self.workers,
                keep_groups=self.keep_groups,
                **self.pool_settings,
            )
        return self._pool

    def close(self) -> None:
        """Stop the environment workers; tasks that broke them again and again are listed."""
        if self._pool is not None:
            if tasks := self._pool.quarantine:
                told = "".join(f"\n  {task}: {reason}" for task, reason in sorted(tasks.items()))
                log.warning("In quarantine, for they broke again and again: %d%s", len(tasks), told)
            self._pool.close()
            self._pool = None

    # ---------------------------------------------------------------------------------- dataloaders

    def train_dataloader(self) -> DataLoader[Task]:
        """Batches of tasks, one batch an iteration, from the module's ``iteration`` on."""
        tasks = self.tasks(self.train_split)
        sizes = len(tasks), self.tasks_per_iteration, self.iterations_per_epoch
        agent: Any = self.trainer and self.trainer.lightning_module
        epoch = self.trainer.current_epoch if self.trainer else 0
        start, played = getattr(agent, "iteration", 0), getattr(agent, "tasks_played", 0)
        end = None if start == self.iterations else self.iterations  # nothing is left: no clipping
        if start // self.iterations_per_epoch != epoch:
            start = epoch * self.iterations_per_epoch  # another trainer, which counts anew
        sampler = TaskSampler(
            *sizes,
            self.seed,
            *self._rank_and_world_size(),
            start=start,
            played=played,
            end=end,
        )
        sampler.set_epoch(epoch)
        return self._loader(tasks, sampler.share, sampler, empty=len(sampler.iterations))

    def tasks_after(self, iteration: int) -> list[Task] | None:
        """This rank's tasks of the iteration after ``iteration``, which is under way, or none."""
        assert self.trainer is not None
        end, epochs = self.iterations, self.trainer.max_epochs
        if end is None and epochs is not None and epochs >= 0:
            end = epochs * self.iterations_per_epoch
        if end is not None and iteration + 1 >= end:
            return None
        tasks, agent = self.tasks(self.train_split), self.trainer.lightning_module
        sizes = len(tasks), self.tasks_per_iteration, self.iterations_per_epoch
        played: Any = agent.tasks_played
        ranks = self._rank_and_world_size()
        sampler = TaskSampler(*sizes, self.seed, *ranks, start=iteration, played=played)
        return [tasks[index] for index in sampler.of(iteration + 1)]

    def val_dataloader(self) -> DataLoader[Task]:
        """The fixed subset that validation plays."""
        tasks = [task for split in self.evaluation_splits for task in self.tasks(split)]
        count = min(self.validation_tasks, len(tasks))
        return self._evaluation_loader([tasks[i * len(tasks) // count] for i in range(count)])

    def test_dataloader(self) -> list[DataLoader[Task]]:
        """Every task of every evaluation split, once; one loader a split."""
        return [self._evaluation_loader(self.tasks(split)) for split in self.evaluation_splits]

    def _evaluation_loader(self, tasks: list[Task]) -> DataLoader[Task]:
        rank, world_size = self._rank_and_world_size()
        mine = tasks[rank::world_size]
        size = self.evaluation_batch if mine else 0
        return self._loader(mine, size, empty=min(1, len(tasks)))

    def _loader(
        self, tasks: list[Task], size: int, sampler: TaskSampler | None = None, *, empty: int
    ) -> DataLoader[Task]:
        """Batches of ``size`` tasks; without a task so many ``empty`` ones.

        Every rank takes part in what all ranks sum up.
        """
        from torch.utils.data import DataLoader

        if not size:
            return DataLoader(tasks, batch_sampler=[[]] * empty, collate_fn=list)  # type: ignore[arg-type]
        return DataLoader(tasks, batch_size=size, sampler=sampler, collate_fn=list)  # type: ignore[arg-type]

    def _rank_and_world_size(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
