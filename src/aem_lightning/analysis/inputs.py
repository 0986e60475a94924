"""What an analysis starts from, and what to type where that is missing: found without torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

from annotated_types import Ge
from omegaconf import DictConfig, OmegaConf

from aem_lightning.analysis.training import arm_overrides
from aem_lightning.runner.checkpoints import needed_checkpoint
from aem_lightning.runner.checks import Group, refuse, wrong_options
from aem_lightning.runner.schema import wrong_settings
from aem_lightning.runner.summary import SUMMARY
from aem_lightning.types import Count, NonNegative, Seed

TIMES = "step_time.json"


@dataclass(frozen=True)
class ProxySettings:
    """The sizes of the analysis; see ``configs/analysis/proxy.yaml``.

    Raises:
        ValueError: Sizes that allow no statistic.
    """

    states: Annotated[int, Ge(2)] = 64
    samples: Annotated[int, Ge(2)] = 64
    split: str = "train"
    tasks: Count = 16
    sharpness: float = 1.0
    min_range: NonNegative = 0.1
    draws: Annotated[int, Ge(100)] = 2000
    seed: Seed = 0

    def __post_init__(self) -> None:
        if problems := [*wrong_settings(type(self), vars(self))]:
            raise ValueError("; ".join(problems))


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """The keys of the analyses that train."""

    name: str | int
    experiment: str
    iterations: Count | None
    overrides: Sequence[str]
    folder: str
    paths: Group


@dataclass(frozen=True, kw_only=True)
class MaskOptions(TrainingOptions):
    """The keys of ``configs/analysis/masks.yaml``."""

    seed: Seed


@dataclass(frozen=True, kw_only=True)
class CompareOptions(TrainingOptions):
    """The keys of ``configs/analysis/compare.yaml``."""

    arms: Sequence[str]
    seeds: Sequence[Seed]
    runs: Mapping[str, Sequence[str]] | None
    games: bool
    draws: Count
    arm_overrides: Mapping[str, Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class TestbedOptions:
    """The keys of ``configs/analysis/testbeds.yaml``."""

    name: str | int
    arms: Sequence[str]
    arm: str
    arm_overrides: Mapping[str, Sequence[str]]
    seeds: Sequence[Seed]
    settings: Mapping[str, Mapping[str, str | Sequence[str | int]]]
    opposite: Sequence[str]
    jobs: Count
    folder: str
    paths: Group


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The keys that ``proxy`` and ``cost`` share."""

    run: str | int | None
    paths: Group


@dataclass(frozen=True, kw_only=True)
class ProxyOptions(ProxySettings, RunOptions):
    """The keys of ``configs/analysis/proxy.yaml``."""

    ckpt: str
    overrides: Sequence[str]


def proxy_settings(cfg: DictConfig) -> ProxySettings:
    """The sizes that ``cfg``, of ``configs/analysis/proxy.yaml``, asks for."""
    return ProxySettings(**{field.name: cfg[field.name] for field in fields(ProxySettings)})


def checkpoint_wishes(cfg: DictConfig) -> DictConfig:
    """What an evaluation would be told to play the checkpoint ``cfg.ckpt``."""
    shared = {name: cfg[name] for name in ("run", "seed", "overrides", "paths")}
    wishes = {"ckpt_path": cfg.ckpt, "temperature": None, "splits": None, **shared}
    return OmegaConf.create(wishes)


def check_proxy(cfg: DictConfig) -> None:
    """Raise where the proxy's sizes or its checkpoint cannot be.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: Sizes that allow no statistic, or no checkpoint is named.
    """
    if OmegaConf.is_missing(cfg, "ckpt"):
        raise ValueError("ckpt is not given: type ckpt=/path/to/last.ckpt, or ckpt=last")
    refuse(wrong_options(cfg, ProxyOptions))
    try:
        needed_checkpoint(checkpoint_wishes(cfg), cfg.run)
    except (FileNotFoundError, ValueError) as error:  # in the words of this command
        raise type(error)(str(error).replace("ckpt_path=", "ckpt=")) from None


def find_run(cfg: DictConfig) -> Path:
    """The run folder of the cost table.

    Raises:
        FileNotFoundError: There is none, or its times are missing.
    """
    logs = Path(cfg.paths.log_dir)
    if cfg.run is not None:
        if not os.path.isfile(Path(str(cfg.run), TIMES)):
            raise FileNotFoundError(
                f"run={cfg.run}: there is no {TIMES} in it. Give the folder of a run that has "
                f"ended, e.g. run={logs}/quickstart/<time>"
            )
        return Path(str(cfg.run))
    found = list(logs.rglob(TIMES))  # those of sweeps, too
    if not found:
        raise FileNotFoundError(
            f"run=null: no run under {logs} has a {TIMES} yet. Type run=<folder of a run>"
        )
    return max(found, key=lambda path: path.stat().st_mtime).parent


def check_masks(cfg: DictConfig) -> None:
    """Raise where the options of the masked runs cannot be."""
    refuse(wrong_options(cfg, MaskOptions))


def check_cost(cfg: DictConfig) -> None:
    """Raise where there is no run for the cost table."""
    refuse(wrong_options(cfg, RunOptions))
    find_run(cfg)


def check_batch(cfg: DictConfig) -> None:
    """Raise where ``cfg.file`` is no file.

    Raises:
        FileNotFoundError: There is none.
        ValueError: None is named.
    """
    if cfg.file is None:
        raise ValueError("file is not given: type file=<run folder>/not_finite_<iteration>_0.pt")
    if not Path(cfg.file).is_file():
        raise FileNotFoundError(
            f"file={cfg.file}: there is no such file. A run that meets NaN or "
            "infinity names the one that it leaves"
        )


def check_compare(cfg: DictConfig) -> None:
    """Raise where a comparison's arms, seeds or runs cannot be."""
    refuse(wrong_options(cfg, CompareOptions))
    if cfg.runs is not None:
        given_runs(cfg)
    else:
        overrides_by_arm(cfg)


def check_testbeds(cfg: DictConfig) -> None:
    """Raise where a setting lacks its experiment or the arm, or opposites are no two settings."""
    refuse(wrong_options(cfg, TestbedOptions))
    problems = []
    for name, setting in cfg.settings.items():
        arms = list(setting.get("arms", cfg.arms))
        if "experiment" not in setting:
            problems.append(f"settings.{name}.experiment is not given: type an experiment's name")
        if cfg.arm not in arms or len(arms) < 2:
            problems.append(
                f"settings.{name}: arms={arms} must hold arm={cfg.arm} and what it is compared "
                f"with: type arms=[grpo,{cfg.arm}]"
            )
    if len(cfg.opposite) != 2 or not set(cfg.opposite) <= set(cfg.settings):
        problems.append(
            f"opposite={list(cfg.opposite)}: type two of the settings, {', '.join(cfg.settings)}"
        )
    refuse(problems)


def overrides_by_arm(cfg: DictConfig) -> dict[str, list[str]]:
    """What each of ``cfg.arms`` changes.

    Raises:
        ValueError: No arm, no seed, or an unknown arm.
    """
    if not cfg.arms or not cfg.seeds:
        raise ValueError(
            f"arms={list(cfg.arms)}, seeds={list(cfg.seeds)}: at least one of each is needed, e.g. "
            "arms=[grpo,grpo_aem] seeds=[0,1,2]"
        )
    return {arm: arm_overrides(cfg, arm) for arm in cfg.arms}


def given_runs(cfg: DictConfig) -> dict[str, dict[int, Path]]:
    """The folders of ``cfg.runs`` by arm and seed.

    Raises:
        FileNotFoundError: One is no folder of a finished run.
        ValueError: Two runs of an arm have one seed.
    """
    found: dict[str, dict[int, Path]] = {}
    for arm, folders in cfg.runs.items():
        seeds = found.setdefault(arm, {})
        for folder in map(Path, folders):
            if not (folder / SUMMARY).is_file():
                raise FileNotFoundError(
                    f"runs.{arm}: {folder} has no {SUMMARY}; give folders of finished runs, e.g. "
                    f"'runs={{{arm}: [logs/quickstart/<time>]}}'"
                )
            seed = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))["seed"]
            if seed in seeds:
                raise ValueError(
                    f"runs.{arm}: {seeds[seed]} and {folder} both have seed {seed}; runs are "
                    "paired by seed, so give one of them"
                )
            seeds[seed] = folder.absolute()
    return found
