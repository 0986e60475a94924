"""What a run takes over from the one that it continues, and what it cannot."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from aem_lightning.runner.build import plain, warm_start_data
from aem_lightning.runner.checkpoints import read_checkpoint
from aem_lightning.runner.checks import refuse
from aem_lightning.runner.next_steps import override
from aem_lightning.types import TROUBLESHOOTING

log = logging.getLogger(__name__)

BEFORE = "success_before.json"
RESUMED = f"{TROUBLESHOOTING}#it-resumed-wrongly"
# The shape of what is trained: a checkpoint's weights fit no other.
SHAPE = ("policy.lora.r", "policy.lora.target_modules", "policy.architecture.")
# Places, and what looks on.
OF_ONE_RUN = ("paths", "ckpt_path", "callbacks", "logger", "trainer.default_root_dir")
# What the evaluation before training depends on, beside the environment.
OF_EVALUATION = (
    "seed",
    "policy",
    "prompt",
    "rewards",
    "eval_temperature",
    "memory",
    "history_length",
    "action",
    "max_turns",
    "max_new_tokens",
    "max_context",
    "datamodule.evaluation_splits",
)


@dataclass(frozen=True)
class Earlier:
    """The run that is continued.

    Attributes:
        checkpoint: The file.
        iteration: Iterations that it has played.
        before: Its evaluation before training, where this run's would come out the same.
    """

    checkpoint: Path
    iteration: int
    before: dict[str, Any] | None


def earlier_run(cfg: DictConfig, checkpoint: Path) -> Earlier:
    """What ``cfg`` continues; the log says where its settings are others.

    Raises:
        ConfigError: Settings that a checkpoint does not fit, each by its name.
        ValueError: The file is no checkpoint.
    """
    ours = read_checkpoint(checkpoint)["aem_lightning"]
    then, now, iteration = ours["config"], plain(cfg), int(ours["iteration"])
    changes = dict(_changes(then, now))
    made_here = SHAPE if cfg.policy.model is None else SHAPE[:-1]
    problems = [
        f"{name}={value!r}: the weights in ckpt_path={checkpoint} are of {name}={was!r}. Type "
        f"{override(name, was)}, or start without ckpt_path; see {RESUMED}"
        for name, (was, value) in changes.items()
        if name.startswith(made_here)
    ]
    if iteration > cfg.iterations:
        problems.append(
            f"iterations={cfg.iterations}: the run of ckpt_path={checkpoint} has played "
            f"{iteration}. Type a larger number, e.g. iterations={2 * iteration}"
        )
    refuse(problems)
    log.info("going on from %s, after iteration %d of %d", checkpoint, iteration, cfg.iterations)
    if iteration == cfg.iterations:
        log.warning("All of iterations=%d are played: a larger number trains on", iteration)
    if changes:
        told = ", ".join(f"{name}={now} (was {was})" for name, (was, now) in changes.items())
        log.info("settings that differ from the checkpoint's: %s", told)
    return Earlier(checkpoint, iteration, _before(cfg, then, checkpoint))


def _before(cfg: DictConfig, then: Mapping[str, Any], checkpoint: Path) -> dict[str, Any] | None:
    now = plain(cfg)
    known = checkpoint.parent.parent / BEFORE  # in the run's folder, which may have been moved
    same = all(_at(then, name) == _at(now, name) for name in OF_EVALUATION)
    played = {name: then["datamodule"].get(name) for name in warm_start_data(cfg)}
    if not (same and played == warm_start_data(cfg) and known.is_file()):
        return None
    found: dict[str, Any] = json.loads(known.read_text(encoding="utf-8"))
    return found


def _changes(
    then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Each setting that differs: its dotted name, what it was, and what it is."""
    for key in {**then, **now}:
        name, was, value = f"{prefix}{key}", then.get(key), now.get(key)
        if name in OF_ONE_RUN:
            continue
        if isinstance(was, Mapping) and isinstance(value, Mapping):
            yield from _changes(was, value, f"{name}.")
        elif was != value:
            yield name, (was, value)


def _at(config: Mapping[str, Any], name: str) -> Any:
    """The value of a dotted name; ``None`` where there is none."""
    found: Any = config
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
