"""Access to what the steps of an agent module return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aem_lightning.types import Iteration, Trajectory


def iteration_of(outputs: Any) -> Iteration | None:
    """The iteration in the outputs of a training step; ``None`` for a module that has none."""
    found = outputs.get("iteration") if isinstance(outputs, Mapping) else None
    return found if isinstance(found, Iteration) else None


def trajectories_of(outputs: Any) -> Sequence[Trajectory]:
    """The trajectories in the outputs of a validation or test step; empty where there are none."""
    found = outputs.get("trajectories") if isinstance(outputs, Mapping) else None
    return found or ()
