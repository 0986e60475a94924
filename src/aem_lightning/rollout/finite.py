"""The error of a number that is infinite or none at all: where it came up, and what shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aem_lightning.types import Trajectory


class NotFiniteError(ValueError):
    """A value is infinite or not a number (NaN).

    Args:
        said: What is not finite, as the beginning of a sentence.
        stage: The stage of an iteration that met it, e.g. ``advantage``.
        tensor: The value's name, e.g. ``alpha``.
        place: Episode, task and turn in words, where it belongs to one.
        advice: What to type; it fits the cause.
        kept: Tensors and plain values that show it again, e.g. the rollout batch.
    """

    def __init__(
        self,
        said: str,
        *,
        stage: str,
        tensor: str,
        place: str = "",
        advice: str = "",
        kept: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(said)
        self.said, self.stage, self.tensor = said, stage, tensor
        self.place, self.advice, self.kept = place, advice, dict(kept or {})

    def __str__(self) -> str:
        where = f" in {self.place}" if self.place else ""
        return f"{self.said}{where}: {self.advice} (stage {self.stage}, tensor {self.tensor})"


def place_of(trajectory: Trajectory, turn: int | None = None) -> str:
    """An episode, its task, and a turn of it, in words."""
    words = f"episode {trajectory.key} (task {trajectory.task.id!r})"
    return words if turn is None else f"{words}, turn {turn}"
