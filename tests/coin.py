"""The toy environment: a coin lies in one of four boxes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from aem_lightning.datamodules import AgentDataModule
from aem_lightning.envs import TextEnv
from aem_lightning.types import Task

BOXES = ("red", "blue", "green", "white")
ACTIONS = tuple(f"open {box} box" for box in BOXES)


class CoinEnv:
    """The task id ``<split>/<number>`` decides where the coin lies; the first text hints at it."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        self._task = (options or {})["task_id"]
        self._coin = BOXES[int(self._task.split("/")[1]) % len(BOXES)]
        return f"A coin glints near the {self._coin} box .", self._info(True)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        valid = action in ACTIONS
        won = valid and self._coin in action
        if won:
            text = "You find the coin !"
        else:
            text = "The box is empty ." if valid else "Nothing happens ."
        return text, float(won), won, False, self._info(valid, won)

    def close(self) -> None:
        """Nothing to free."""

    def _info(self, valid: bool, won: bool = False) -> dict[str, Any]:
        return {
            "task_id": self._task,
            "goal": "find the coin",
            "admissible_actions": ACTIONS,
            "is_action_valid": valid,
            "won": won,
            "score": float(won),
        }


class SlowCoin(CoinEnv):
    """Answers after a time that nobody can foresee."""

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        time.sleep(os.urandom(1)[0] / 255 * 0.02)
        return super().step(action)


class FragileCoin(CoinEnv):
    """Its machinery is down for evaluations, and raises where the coin is in the red box."""

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if not self._task.startswith("train"):
            return "", 0.0, False, True, {"infra_error": "the sandbox is gone"}
        if self._coin == "red":
            raise RuntimeError("the red box is stuck")
        return super().step(action)


class CoinExpert:
    """Opens the box that the hint names, after ``detours`` others."""

    def __init__(self, detours: int) -> None:
        self._detours = detours

    def act(self, observation: str, admissible: Any) -> str:
        if observation.startswith("A coin"):
            self._coin = observation.split()[5]
        if self._detours:
            self._detours -= 1
            return next(action for action in admissible if self._coin not in action)
        return f"open {self._coin} box"


class CoinDataModule(AgentDataModule):
    """``sizes`` tasks in each split."""

    def __init__(self, sizes: dict[str, int] | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.sizes = sizes or {"train": 8, "valid_seen": 4, "valid_unseen": 4}

    def tasks(self, split: str) -> list[Task]:
        return [
            Task(f"{split}/{i}", BOXES[i % len(BOXES)], split) for i in range(self.sizes[split])
        ]

    def env_factory(self) -> Callable[[], TextEnv]:
        return CoinEnv

    def make_expert(self, task: Task, seed: int) -> CoinExpert:
        return CoinExpert(seed % 2)

    def vocabulary(self) -> list[str]:
        return [
            *ACTIONS,
            "A coin glints near the box . You find the coin !",
            "The box is empty . Nothing happens . find the coin",
        ]


class FragileCoinDataModule(CoinDataModule):
    """The same tasks, in an environment whose machinery breaks."""

    def env_factory(self) -> Callable[[], TextEnv]:
        return FragileCoin
