"""An episode as its pool knows it: where it is played, and all that it takes to play it again."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from aem_lightning.envs.orders import Order
from aem_lightning.types import EnvStep, ResetRequest

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class PooledEpisode:
    """An episode in a slot: all that it takes to play it again."""

    key: str
    request: ResetRequest
    worker: int
    slot: int
    actions: list[str] = field(default_factory=list)
    last: EnvStep | None = None  # None until the reset is answered

    @property
    def is_over(self) -> bool:
        return self.last is not None and (self.last.terminated or self.last.truncated)

    def next_order(self, action: str | None) -> Order:
        """The order that continues the episode: its reset where ``action`` is None."""
        if action is None:
            return Order(self.slot, self.request)
        return Order(self.slot, None, (action,))

    def replay_order(self, action: str | None) -> Order:
        """The order that plays the episode from its start, then ``action``, if one is due."""
        return Order(
            self.slot, self.request, (*self.actions, *([] if action is None else [action]))
        )

    def record(self, action: str | None, step: EnvStep) -> None:
        """Take ``step`` as the answer to ``action``."""
        if action is not None:
            self.actions.append(action)
        self.last = step

    def fail(self, reason: str, level: int = logging.WARNING) -> None:
        """End the episode for a reason outside the policy's doing, and log it."""
        text = "Episode %s of task %s ends: %s"
        logger.log(level, text, self.key, self.request.task_id, reason)
        self.end(reason)

    def end(self, reason: str) -> None:
        """The same, without a word."""
        observation = self.last.observation if self.last else ""
        info = {"task_id": self.request.task_id, "infra_error": reason}
        self.last = EnvStep(observation, truncated=True, info=info)
