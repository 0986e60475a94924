"""What an environment pays, held against what a run makes of it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any, Protocol

from aem_lightning.types import EnvStep


class Shaping(Protocol):
    """The reward of a turn, as the run counts it; `RewardShaping` is one."""

    def __call__(self, step: EnvStep, *, malformed: bool) -> float:
        """What ``step`` earns."""
        ...


def lost_rewards(steps: Collection[EnvStep], shaping: Shaping) -> str | None:
    """What of an environment's rewards, or of its wins, earns nothing, and what to type.

    Args:
        steps: What it answered.
        shaping: What each answer is worth.

    Example:
        >>> step = EnvStep("", 0.5)
        >>> lost_rewards([step], lambda step, malformed: step.reward)
        >>> lost_rewards([step], lambda step, malformed: 0.0).split(":")[0]
        'the environment gave rewards, e.g. 0.5, and nothing of them is used'
    """

    def counts(step: EnvStep, **less: Any) -> bool:
        other = replace(step, **less)
        return shaping(step, malformed=False) != shaping(other, malformed=False)

    paid = [step for step in steps if step.reward]
    won = [step for step in steps if step.won]
    wins_pay = any(counts(step, reward=0.0, info={**step.info, "won": False}) for step in won)
    # A reward for a win alone says what the win says.
    said_by_wins = wins_pay and all(step.won for step in paid)
    if paid and not said_by_wins and not any(counts(step, reward=0.0) for step in paid):
        return (
            f"the environment gave rewards, e.g. {paid[0].reward:g}, and nothing of them is used: "
            "type rewards=passthrough, or rewards.environment=1 beside what the others earn"
        )
    if won and not wins_pay:
        return "a win earns nothing: type rewards=success_only, or rewards.success=1"
    return None
