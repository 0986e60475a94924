"""Finished episodes on disk: a file of transcripts from which a run can be taken up again."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aem_lightning.callbacks.transcripts import (
    append_json_line,
    episode_record,
    recorded_episode,
)
from aem_lightning.types import Task, Trajectory


class EpisodeStore:
    """Finished episodes in a file of transcripts, each under its key; many threads may add.

    The file may hold episodes of other runs; ``tasks`` are this run's, with the number of their
    repeat, by their keys, and every record says ``label`` of it.

    Attributes:
        episodes: The finished episodes of this run's tasks.
        tokens: What they cost.
        handled: What was out of the ordinary in them, by kind.
    """

    def __init__(
        self, path: Path, tasks: Mapping[str, tuple[Task, int]], label: Mapping[str, Any]
    ) -> None:
        self.path = path
        self.episodes: list[Trajectory] = []
        self.tokens = {"prompt": 0, "completion": 0}
        self.handled: Counter[str] = Counter()
        self._keys = {task: key for key, task in tasks.items()}
        self._label = label
        self._lock = threading.Lock()
        known = {record["key"]: record for record in _records(path) if record.get("key") in tasks}
        for record in known.values():
            self._take(recorded_episode(record), record["spent"], record.get("handled", {}))

    @property
    def missing(self) -> list[tuple[Task, int]]:
        """Tasks, each with its repeat, without a finished episode."""
        played = {(trajectory.task, trajectory.copy) for trajectory in self.episodes}
        return [due for due in self._keys if due not in played]

    def add(
        self, trajectory: Trajectory, spent: Mapping[str, int], handled: Mapping[str, int]
    ) -> None:
        """Keep a finished episode."""
        key = self._keys[trajectory.task, trajectory.copy]
        costs = {"spent": spent, "handled": handled}
        record = {**self._label, "key": key, **costs, **episode_record(trajectory)}
        with self._lock:
            append_json_line(self.path, record)
            self._take(trajectory, spent, handled)

    def _take(
        self, trajectory: Trajectory, spent: Mapping[str, int], handled: Mapping[str, int]
    ) -> None:
        self.handled.update(handled)
        self.episodes.append(trajectory)
        for name, count in spent.items():
            self.tokens[name] += count


def _records(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):  # the half line of a killed run
                yield json.loads(line)
