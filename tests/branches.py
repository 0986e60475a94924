"""A one-turn environment whose answers branch: some leave much open, and none is worth more."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Any

from aem_lightning.datamodules import AgentDataModule
from aem_lightning.envs import TextEnv
from aem_lightning.types import Task

# "rest now" is certain once begun; "try" goes on in one of eight ways.
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
ACTIONS = ("rest now", *(f"try {number}" for number in NUMBERS))


class BranchEnv:
    """Which actions win is drawn for each task alone, and the observation does not tell."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        self._task = (options or {})["task_id"]
        return "What now ?", self._info(True)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        valid = action in ACTIONS
        digest = hashlib.sha256(f"{self._task}/{action}".encode()).digest()
        won = valid and digest[0] % 2 == 0
        return "Well .", float(won), True, False, self._info(valid, won)

    def close(self) -> None:
        """Nothing to free."""

    def _info(self, valid: bool, won: bool = False) -> dict[str, Any]:
        return {
            "task_id": self._task,
            "goal": "guess",
            "admissible_actions": ACTIONS,
            "is_action_valid": valid,
            "won": won,
            "score": float(won),
        }


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
