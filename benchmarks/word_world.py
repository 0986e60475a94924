"""A game of words for benchmarks: ragged observations and episodes, at no cost worth measuring.

It imports nothing heavy: environment workers load it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

WORDS = tuple(f"w{number}" for number in range(4000))
DONE = "done"


class WordGame:
    """Says random words that depend on the task and on all actions so far.

    Args:
        turns: Longest episode; the shortest is half of it.
        opening: Words of the first observation, least and most.
        reply: Words of every later one.
    """

    def __init__(
        self,
        turns: int = 20,
        opening: tuple[int, int] = (300, 500),
        reply: tuple[int, int] = (30, 80),
    ) -> None:
        self.turns, self.opening, self.reply = turns, opening, reply

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        self.task_id = str((options or {})["task_id"])
        self.random = random.Random(self.task_id)
        self.taken, self.last = 0, self.turns
        self.goal = self._say(self.opening)
        return self.goal, {"task_id": self.task_id, "goal": self.goal}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self.taken == 0:  # from here on the copies of a group go their own ways
            self.random = random.Random(self.task_id + action)
            self.last = self.random.randint(max(1, self.turns // 2), self.turns)
        self.taken += 1
        is_over = self.taken >= self.last
        won = is_over and self.random.random() < 0.5
        text = self._say(self.reply) + (f" {DONE}" if is_over else "")
        info = {"task_id": self.task_id, "goal": self.goal, "won": won, "is_action_valid": True}
        return text, float(won), is_over, False, info

    def close(self) -> None:
        """Nothing to free."""

    def _say(self, bounds: tuple[int, int]) -> str:
        return " ".join(self.random.choices(WORDS, k=self.random.randint(*bounds)))
