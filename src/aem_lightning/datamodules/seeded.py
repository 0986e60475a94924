"""Environments whose start states are numbers, such as the seeds of another library."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from aem_lightning.datamodules.agent import AgentDataModule
from aem_lightning.envs import TextEnv
from aem_lightning.envs.adapters import GymnasiumEnv
from aem_lightning.types import Count, Task

SIZES = {"train": 1000, "valid": 100}


class SeededDataModule(AgentDataModule):
    """Numbers as tasks: each split takes the numbers behind the ones before it, so none is shared.

    Args:
        env: A picklable function that makes one environment, e.g. a partial of `TextArenaEnv`.
        sizes: Tasks of each split, ``train`` and those of ``evaluation_splits``.
        task_type: What results are broken down by.
        settings: Arguments of `AgentDataModule`; ``evaluation_splits`` are by default all splits
            but ``train``.

    Raises:
        ValueError: A split that is to be played has no size.
    """

    def __init__(
        self,
        env: Callable[[], TextEnv],
        *,
        sizes: Mapping[str, Count] | None = None,
        task_type: str = "",
        **settings: Any,
    ) -> None:
        self.sizes = dict(sizes or SIZES)
        others = tuple(split for split in self.sizes if split != self.train_split)
        super().__init__(**{"evaluation_splits": others, **settings})
        self.env, self.task_type = env, task_type
        for split in (self.train_split, *self.evaluation_splits):
            if self.sizes.get(split, 0) < 1:
                raise ValueError(
                    f"datamodule.sizes={self.sizes} has no tasks for {split!r}: type "
                    f"datamodule.sizes.{split}=100, or other datamodule.evaluation_splits"
                )

    def tasks(self, split: str) -> list[Task]:
        """``sizes[split]`` numbers; the first split begins at 0."""
        splits = list(self.sizes)
        first = sum(self.sizes[earlier] for earlier in splits[: splits.index(split)])
        numbers = range(first, first + self.sizes[split])
        return [Task(f"{split}/{number:07d}", self.task_type, split) for number in numbers]

    def env_factory(self) -> Callable[[], TextEnv]:
        """What was given."""
        return self.env


class GymnasiumDataModule(SeededDataModule):
    """Any environment id of Gymnasium whose observations are text; its seeds are the tasks.

    Args:
        env_id: As for ``gymnasium.make``; ``my_package:MyEnv-v0`` imports the package first.
        action_names: A word for each action of a discrete action space, in its order.
        describe: Makes text of observations that are none; a function of an importable module.
        win_at: The last reward of a win, where the environment does not say who won.
        arguments: More for ``gymnasium.make``.
        settings: Arguments of `SeededDataModule`.
    """

    def __init__(
        self,
        env_id: str,
        *,
        action_names: Sequence[str] | None = None,
        describe: Callable[[Any], str] | None = None,
        win_at: float = 1.0,
        arguments: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        env = partial(
            GymnasiumEnv,
            env_id,
            action_names=action_names,
            describe=describe,
            win_at=win_at,
            **(arguments or {}),
        )
        super().__init__(env, **{"task_type": env_id.rpartition(":")[2], **settings})
