"""The toy environment; apart from its DataModule, so that workers start light."""

from __future__ import annotations

import os
import time
from typing import Any

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
