"""A task with which any model has mixed success: a reply of an even number of characters wins.

An untrained chat model plays no real task well enough for a group to be mixed, and what is tested
here is the way that tokens, adapters and log-probabilities take, not what is learnt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aem_lightning.datamodules import AgentDataModule
from aem_lightning.envs import TextEnv
from aem_lightning.types import Task

TOPICS = ("rivers", "bread", "clocks", "rain")


class ParityEnv:
    """Says whether a reply was even; an episode is won by the first that is, from turn two on."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        self._task, self._turn = (options or {})["task_id"], 0
        topic = TOPICS[int(self._task.split("/")[1]) % len(TOPICS)]
        return f"Write one short line about {topic}.", self._info(False)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self._turn += 1
        won = self._turn > 1 and len(action) % 2 == 0
        return "Another line, please.", float(won), won, False, self._info(won)

    def close(self) -> None:
        """Nothing to free."""

    def _info(self, won: bool) -> dict[str, Any]:
        known = {"task_id": self._task, "goal": "write lines", "admissible_actions": ()}
        return {**known, "is_action_valid": True, "won": won, "score": float(won)}


class ParityDataModule(AgentDataModule):
    """Four tasks in each split."""

    def tasks(self, split: str) -> list[Task]:
        return [Task(f"{split}/{i}", topic, split) for i, topic in enumerate(TOPICS)]

    def env_factory(self) -> Callable[[], TextEnv]:
        return ParityEnv

    def vocabulary(self) -> list[str]:
        return list(TOPICS)
