"""What an evaluation leaves behind: ``evaluation.json``, transcripts, a table in the terminal."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aem_lightning.callbacks.transcripts import append_json_line, episode_record
from aem_lightning.datamodules import AgentDataModule
from aem_lightning.files import write_atomically
from aem_lightning.metrics import success_summary
from aem_lightning.runner.next_steps import command
from aem_lightning.runner.summary import print_results
from aem_lightning.types import Trajectory

log = logging.getLogger(__name__)


def results_of(played: Sequence[Trajectory], splits: Iterable[str]) -> dict[str, Any]:
    """Success over all episodes together and for each split, and every episode's outcome.

    A split whose every episode broke is left out.

    Raises:
        NothingToJudgeError: Every episode broke.
    """
    parts = {split: [t for t in played if t.task.split == split] for split in splits}
    return {
        "success": success_summary(played),
        "by_split": {
            split: success_summary(part)
            for split, part in parts.items()
            if not all(trajectory.infra_error for trajectory in part)
        },
        "episodes": list(map(_outcome, sorted(played, key=lambda t: (t.task.split, t.task.id)))),
    }


def game_hashes(datamodule: AgentDataModule) -> dict[str, str]:
    """A hash of each split's games, where the DataModule knows one."""
    hashes = getattr(datamodule, "game_hashes", None)
    return dict(hashes()) if hashes else {}


def write_report(folder: Path, report: Mapping[str, Any], title: str) -> None:
    """Write ``evaluation.json``, show its success rates, and say how to see the episodes."""
    target = folder / "evaluation.json"
    write_atomically(target, json.dumps(report, indent=2))
    print_results(title, {"success": report["success"], **report["by_split"]})
    log.info("written: %s", target)
    viewer = command("-m", "aem_lightning.viewer", str(report["transcripts"]))
    log.info("to see the episodes: %s", viewer)


def write_transcripts(path: Path, played: Iterable[Trajectory], iteration: int) -> None:
    """Append every episode to a file of transcripts."""
    for trajectory in played:
        record = episode_record(trajectory)
        append_json_line(path, {"stage": "evaluate", "iteration": iteration, **record})


def _outcome(trajectory: Trajectory) -> dict[str, Any]:
    turns = trajectory.turns
    return {
        "task": trajectory.task.id,
        "type": trajectory.task.type,
        "split": trajectory.task.split,
        "won": trajectory.won,
        "score": trajectory.score,
        "turns": len(turns),
        "malformed": sum(turn.action is None for turn in turns),
        "inadmissible": sum(turn.action is not None and not turn.is_valid for turn in turns),
        "infra_error": trajectory.infra_error,
    }
