"""Reward shaping: from the environment's word to the number that the estimators see."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

from aem_lightning.types import EnvStep


class BadRewardError(ValueError):
    """An environment's reward that counts is no finite number."""


@dataclass(frozen=True)
class RewardShaping:
    """Reward of one turn.

    ``environment`` times the environment's own reward, plus ``success`` when the episode is won on
    this turn, plus the penalties (given as negative numbers) for a malformed response (no action in
    it), an action that is not admissible, and each step. The defaults are the paper's for ALFWorld:
    10 for success, -0.1 for each invalid action.

    Raises:
        ValueError: A value that is not a finite number, or a penalty above 0.
    """

    success: float = 10.0
    environment: float = 0.0
    malformed: float = -0.1
    inadmissible: float = -0.1
    step: float = 0.0

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if not math.isfinite(value):
                raise ValueError(f"rewards.{name}={value}: a finite number, e.g. rewards.{name}=0")
            if name in ("malformed", "inadmissible", "step") and value > 0:
                raise ValueError(
                    f"rewards.{name}={value} would reward what it is to punish: give a number "
                    f"<= 0, rewards.{name}={-value}"
                )

    def __call__(self, step: EnvStep, *, malformed: bool) -> float:
        """The shaped reward of the turn that ``step`` answers.

        Raises:
            BadRewardError: The environment's own counts, and is no finite number.
        """
        reward = float(self.step)
        if self.environment:
            given: Any = step.reward
            if not isinstance(given, Real) or not math.isfinite(given):
                raise BadRewardError(f"reward={given!r}; expected a finite number")
            reward += self.environment * float(given)
        if step.won:
            reward += self.success
        if malformed:
            reward += self.malformed
        elif not step.is_action_valid:
            reward += self.inadmissible
        return reward
