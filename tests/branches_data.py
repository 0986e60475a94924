"""The branching environment as a DataModule."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from branches import ACTIONS, NUMBERS, BranchEnv

from aem_lightning.datamodules import AgentDataModule
from aem_lightning.envs import TextEnv
from aem_lightning.types import Task


class Guesser:
    """Takes either branch as often, and each way of the open one as often."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def act(self, observation: str, admissible: Any) -> str:
        if self._random.random() < 0.5:
            return "rest now"
        return f"try {self._random.choice(NUMBERS)}"


class BranchDataModule(AgentDataModule):
    def tasks(self, split: str) -> list[Task]:
        return [Task(f"{split}/{i}", "guess", split) for i in range(512 if split == "train" else 2)]

    def env_factory(self) -> Callable[[], TextEnv]:
        return BranchEnv

    def make_expert(self, task: Task, seed: int) -> Guesser:
        return Guesser(seed)

    def vocabulary(self) -> list[str]:
        return [*ACTIONS, "What now ? Well . guess Your task is to :"]
