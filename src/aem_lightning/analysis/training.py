"""Training runs inside an analysis: real ones, each in its own folder, none of them run twice."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig

from aem_lightning import runner
from aem_lightning.runner.shipped import shipped
from aem_lightning.runner.summary import SUMMARY
from aem_lightning.runner.trust import remember

log = logging.getLogger(__name__)

ASKED = "analysis_overrides.json"


def finished_run(cfg: DictConfig, folder: Path, arm: Sequence[str], seed: int) -> Path:
    """``folder`` with a finished training run of ``cfg.experiment`` under the overrides ``arm``.

    A finished run is left as it is, an interrupted one is continued from its last epoch.

    Raises:
        ValueError: ``folder`` holds a run of other overrides.
    """
    length = [] if cfg.iterations is None else [f"iterations={cfg.iterations}"]
    # Those of a person come after the arm's.
    overrides = [f"experiment={cfg.experiment}", *arm, *cfg.overrides, *length, f"seed={seed}"]
    asked = folder / ASKED
    earlier = json.loads(asked.read_text(encoding="utf-8")) if asked.is_file() else overrides
    if earlier != overrides:
        only_then = [item for item in earlier if item not in overrides]
        only_now = [item for item in overrides if item not in earlier]
        raise ValueError(
            f"{folder} holds a run of other overrides: then {only_then}, now {only_now} (or in "
            "another order). Type the same ones, or another place: folder=<new folder>"
        )
    remember(hydra.compose("train", overrides=overrides))
    if (folder / SUMMARY).is_file():
        log.info("%s: finished before", folder)
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    asked.write_text(json.dumps(overrides, indent=2), encoding="utf-8")
    last = folder / "checkpoints" / "last.ckpt"
    shared = {name: cfg.paths[name] for name in ("root_dir", "data_dir", "log_dir")}
    places = [f"paths.{k}={quoted(v)}" for k, v in (shared | {"output_dir": folder}).items()]
    places.append(f"ckpt_path={quoted(last) if last.is_file() else 'null'}")
    log.info("%s: training with %s", folder, " ".join(overrides))
    runner.train(hydra.compose("train", overrides=[*overrides, *places]))
    return folder


def quoted(value: Any) -> str:
    """A value as Hydra's override grammar takes it, whatever characters it holds."""
    return QuotedString(str(value), Quote.single).with_quotes()


def arm_overrides(cfg: DictConfig, name: str) -> list[str]:
    """What the arm ``name`` changes.

    From ``cfg.arm_overrides``; else ``x`` is ``algorithm=x`` without modulation, and ``x_aem`` the
    same with AEM.

    Raises:
        ValueError: There is no such arm.
    """
    if name in cfg.arm_overrides:
        return list(cfg.arm_overrides[name])
    algorithms = sorted(path.stem for path in (shipped("configs") / "algorithm").glob("*.yaml"))
    algorithm = name.removesuffix("_aem")
    if algorithm in algorithms:
        return [f"algorithm={algorithm}", f"modulation={'none' if name == algorithm else 'aem'}"]
    allowed = ", ".join(dict.fromkeys([*cfg.arm_overrides, *algorithms]))
    raise ValueError(
        f"arms: {name!r} is unknown; allowed: {allowed}, and each algorithm with _aem. Or say what "
        f"it changes: \"+arm_overrides.{name}=['modulation=aem','modulation.sharpness=2']\""
    )
