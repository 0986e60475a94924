"""What an evaluation leaves behind: ``evaluation.json``, transcripts, a table in the terminal."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from aem_lightning.callbacks.transcripts import append_json_line, episode_record
from aem_lightning.datamodules import AgentDataModule
from aem_lightning.files import write_atomically
from aem_lightning.metrics import success_summary
from aem_lightning.modules import AgentModule
from aem_lightning.runner.next_steps import command
from aem_lightning.runner.summary import print_counts, print_results
from aem_lightning.types import Trajectory, malformed_kinds

log = logging.getLogger(__name__)


def about(
    module: AgentModule, config: DictConfig, adapter: str | None, checkpoint: Path | None
) -> dict[str, Any]:
    """Who plays an evaluation, and how: what has to be the same for its figures to come again."""
    tokenizer = module.policy.tokenizer
    source = "model"
    if adapter is not None and (Path(adapter).expanduser() / "tokenizer_config.json").is_file():
        source = "adapter"
    if config.policy.chat_template is not None:
        source = "policy.chat_template"
    text = str(tokenizer.get_chat_template())
    return {
        "model": str(module.policy.causal_lm.name_or_path),
        "adapter": adapter,
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "iteration": module.iteration,
        "template": {"of": source, "sha256": hashlib.sha256(text.encode()).hexdigest()},
        "engine": OmegaConf.to_container(config.engine, resolve=True),
        "temperature": config.eval_temperature,
        "seed": config.seed,
        "repeats": module.repeats,
    }


def results_of(
    played: Sequence[Trajectory], splits: Iterable[str], repeats: int = 1
) -> dict[str, Any]:
    """Success over all episodes together and for each split, and every episode's outcome.

    A split whose every episode broke is left out. Each task was played ``repeats`` times.

    Raises:
        NothingToJudgeError: Every episode broke.
    """
    parts = {split: [t for t in played if t.task.split == split] for split in splits}
    return {
        "success": success_summary(played, repeats),
        "by_split": {
            split: success_summary(part, repeats)
            for split, part in parts.items()
            if not all(trajectory.infra_error for trajectory in part)
        },
        "malformed": dict(malformed_kinds(turn for t in played for turn in t.turns).most_common()),
        "episodes": list(
            map(_outcome, sorted(played, key=lambda t: (t.task.split, t.task.id, t.copy)))
        ),
    }


def game_hashes(datamodule: AgentDataModule) -> dict[str, str]:
    """A hash of each split's games, where the DataModule knows one."""
    hashes = getattr(datamodule, "game_hashes", None)
    return dict(hashes()) if hashes else {}


def write_report(folder: Path, report: Mapping[str, Any], title: str) -> None:
    """Write ``evaluation.json``, show who played and won, and say how to see the episodes."""
    target = folder / "evaluation.json"
    write_atomically(target, json.dumps(report, indent=2))
    console = Console()
    for line in _who_played(report):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    print_results(title, {"success": report["success"], **report["by_split"]})
    print_counts("malformed responses", report["malformed"])
    log.info("written: %s", target)
    viewer = command("-m", "aem_lightning.viewer", str(report["transcripts"]))
    log.info("to see the episodes: %s", viewer)


def write_transcripts(path: Path, module: AgentModule, model: str) -> None:
    """Append every episode that ``module`` has tested to a file of transcripts."""
    label = {"stage": "evaluate", "iteration": module.iteration, "model": model}
    for trajectory in module.tested:
        record = episode_record(trajectory, read=module.encoder.read)
        append_json_line(path, {**label, **record})


def _who_played(report: Mapping[str, Any]) -> Iterator[str]:
    """The part of a report that says who played, as lines for people."""
    games = len({(episode["split"], episode["task"]) for episode in report["episodes"]})
    template, engine = report.get("template"), report.get("engine")
    lines = {
        **{name: report.get(name) for name in ("model", "adapter", "checkpoint", "base_url")},
        "template": template and f"of the {template['of']}, sha256 {template['sha256'][:12]}",
        "engine": engine and engine["_target_"].rpartition(".")[2],
        **{name: report.get(name) for name in ("temperature", "seed")},
        "played": f"{games} games × {report['repeats']}",
    }
    yield from (f"{name}: {value}" for name, value in lines.items() if value is not None)


def _outcome(trajectory: Trajectory) -> dict[str, Any]:
    turns = trajectory.turns
    return {
        "task": trajectory.task.id,
        "repeat": trajectory.copy,
        "type": trajectory.task.type,
        "split": trajectory.task.split,
        "won": trajectory.won,
        "score": trajectory.score,
        "turns": len(turns),
        "malformed": sum(turn.action is None for turn in turns),
        "inadmissible": sum(turn.action is not None and not turn.is_valid for turn in turns),
        "infra_error": trajectory.infra_error,
    }
