"""Tasks that break their environment again and again."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable

logger = logging.getLogger(__name__)

OCCASIONS = 2
PASSED_OVER = 8


class Quarantine(dict[str, str]):
    """Tasks that are not played, and what broke them last.

    A task gets here on the second occasion that it breaks episodes beyond repair. An occasion is a
    group, or whatever else of the task is played at the same time: what breaks together may have
    one passing cause, such as a server that is down. So it is played again after it was passed over
    on eight occasions, and is back here at once where it breaks once more.
    """

    def __init__(self) -> None:
        super().__init__()
        self._occasions: Counter[str] = Counter()
        self._passed_over: Counter[str] = Counter()
        self._blamed: set[str] = set()  # on the occasion under way
        self._named: set[str] = set()

    def start(self, tasks: Iterable[str]) -> None:
        """An occasion begins for ``tasks``, of which nothing was in play."""
        for task in tasks:
            self._blamed.discard(task)
            if task in self:
                self._passed_over[task] += 1
                if self._passed_over[task] > PASSED_OVER:
                    del self[task], self._passed_over[task]

    def blame(self, task: str, reason: str) -> None:
        """An episode of ``task`` was given up."""
        if task in self._blamed:
            return
        self._blamed.add(task)
        self._occasions[task] += 1
        if self._occasions[task] >= OCCASIONS:
            self[task] = reason
            if task not in self._named:
                text = "Task %r broke on %d occasions and is in quarantine; the last: %s"
                logger.warning(text, task, OCCASIONS, reason)
            self._named.add(task)
