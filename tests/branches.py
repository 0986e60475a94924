"""A one-turn environment whose answers branch: some leave much open, and none is worth more.

Apart from its DataModule, so that workers start light.
"""

from __future__ import annotations

import hashlib
from typing import Any

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
