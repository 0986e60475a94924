"""Tasks that break their environment again and again."""

from __future__ import annotations

import logging
from collections import Counter

logger = logging.getLogger(__name__)

OCCASIONS = 2


class Quarantine(dict[str, str]):
    """Tasks that are not played any more, and what broke them last.

    A task gets here on the second occasion that it breaks episodes beyond repair. An occasion is a
    group, or whatever else of the task is played at the same time: what breaks together may have
    one passing cause, such as a server that is down.
    """

    def __init__(self) -> None:
        super().__init__()
        self._occasions: Counter[str] = Counter()
        self._blamed: set[str] = set()  # on the occasion under way

    def start(self, tasks: set[str]) -> None:
        """Play of ``tasks`` begins, of which nothing was in play."""
        self._blamed -= tasks

    def blame(self, task: str, reason: str) -> None:
        """An episode of ``task`` was given up."""
        if task in self._blamed or task in self:
            return
        self._blamed.add(task)
        self._occasions[task] += 1
        if self._occasions[task] >= OCCASIONS:
            self[task] = reason
            text = "Task %r broke on %d occasions and is not played any more; the last: %s"
            logger.warning(text, task, OCCASIONS, reason)
