"""Analysis C: arms paired by seed, from one warm start, on the same tasks and sampling seeds."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from aem_lightning.analysis.curves import Curve, read_curves
from aem_lightning.analysis.inputs import checkpoint_wishes, given_runs, overrides_by_arm
from aem_lightning.analysis.picture import caption_of, draw_comparison, title_of
from aem_lightning.analysis.report import (
    Picture,
    need_matplotlib,
    relative,
    typed_command,
    write_report,
)
from aem_lightning.analysis.statistics import mcnemar, sign_flip_test, t_interval
from aem_lightning.analysis.tables import (
    ALL,
    MEASURES,
    comparison_markdown,
    ordered,
)
from aem_lightning.analysis.training import finished_run
from aem_lightning.runner.checkpoints import read_checkpoint
from aem_lightning.runner.evaluation import evaluate
from aem_lightning.runner.summary import SUMMARY

log = logging.getLogger(__name__)

CURVES = ("train/success_rate", "val/success_rate", "aem/entropy", "time/total")
# What the modulation had to work with, and what it did.
EFFECTS = ("rollout/mixed_groups", "aem/gated_groups", "aem/alpha_min", "aem/alpha_max")
MASSES = tuple(f"aem/mass_{of}{up}" for of in ("base_", "") for up in ("positive", "negative"))


@dataclass(frozen=True)
class Run:
    """A finished training run of an arm.

    Attributes:
        arm: Its name.
        seed: Of the run: runs of one seed are a pair.
        folder: Where it lies.
        success: Final success rate by task type and over ``all``, 0 to 1; empty where the run has
            not played the evaluation games.
        curves: Of ``CURVES``, ``EFFECTS`` and ``MASSES``, by tag.
        games: Whether each evaluation game was won, by its task id; empty where not played.
        before: Success rate of all evaluation games before training; ``None`` where not played.
    """

    arm: str
    seed: int
    folder: Path
    success: Mapping[str, float]
    curves: Mapping[str, Curve]
    games: Mapping[str, bool]
    before: float | None = None


def compare(cfg: DictConfig) -> dict[str, Any]:
    """Run the arms that are missing, then compare them all."""
    need_matplotlib()
    runs = [
        _read(cfg, arm, seed, folder)
        for arm, seeds in _folders(cfg).items()
        for seed, folder in seeds.items()
    ]
    experiment = None if cfg.runs else cfg.experiment
    content = comparison(runs, cfg.draws, experiment=experiment, command=typed_command())
    return write_report(
        Path(cfg.folder),
        cfg.name,
        content,
        Picture(draw_comparison(content), title_of(content), caption_of(content)),
        scalars=_scalars(content),
        table=comparison_markdown(content),
    )


def comparison(
    runs: Sequence[Run],
    draws: int,
    *,
    experiment: str | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """What ``compare.json`` holds of ``runs``; the first arm is the base of those without one."""
    arms = list(dict.fromkeys(run.arm for run in runs))
    return {
        "experiment": experiment,
        "command": command,
        "runs": [_described(run) for run in runs],
        "arms": {arm: arm_statistics([run for run in runs if run.arm == arm]) for arm in arms},
        "pairs": [
            pair_statistics(runs, base_of(arm, arms), arm, draws=draws)
            for arm in arms
            if base_of(arm, arms) != arm
        ],
    }


def base_of(arm: str, arms: Sequence[str]) -> str:
    """What an arm is paired with: ``x`` for ``x_aem`` where it takes part, else the first arm."""
    without = arm.removesuffix("_aem")
    return without if without != arm and without in arms else arms[0]


def arm_statistics(runs: Sequence[Run]) -> dict[str, Any]:
    """Means over seeds with Student's interval: final success by type, and the four summaries."""
    rates = {
        kind: t_interval([run.success[kind] for run in runs if kind in run.success], rates=True)
        for kind in ordered({kind for run in runs for kind in run.success})
    }
    return {
        "success": {kind: asdict(found) for kind, found in rates.items()},
        **{
            name: asdict(t_interval([v for run in runs if (v := _measure(run, name)) is not None]))
            for name in MEASURES
        },
        "effects": effects(runs),
    }


def effects(runs: Sequence[Run]) -> dict[str, float | None]:
    """Means over iterations and runs: ``EFFECTS``, and positive advantages' share in sum |A|."""

    def values(tag: str) -> list[float]:
        return [value for run in runs for value in run.curves.get(tag, ([], []))[1]]

    found = {tag: _mean(values(tag)) for tag in EFFECTS}
    for name, tags in (("base", MASSES[:2]), ("modulated", MASSES[2:])):
        masses = zip(*map(values, tags), strict=True)
        found[f"positive_share_{name}"] = _mean(
            [up / (up + down) for up, down in masses if up + down]
        )
    return found


def pair_statistics(runs: Sequence[Run], base: str, arm: str, *, draws: int) -> dict[str, Any]:
    """The arm minus its base over the seeds that both have.

    ``p_sign_flip`` (over seeds) asks whether the *method* differs: the unit is a training run.
    ``mcnemar`` pools games over seeds and asks whether *these* policies differ: its p says nothing
    about other seeds.
    """
    first = {run.seed: run for run in runs if run.arm == base}
    second = {run.seed: run for run in runs if run.arm == arm}
    seeds = sorted(first.keys() & second.keys())
    pairs = [(first[seed], second[seed]) for seed in seeds]

    def difference(value: Callable[[Run], float | None]) -> dict[str, Any]:
        both = [(value(one), value(other)) for one, other in pairs]
        found = [y - x for x, y in both if x is not None and y is not None]
        p = sign_flip_test(found, draws=draws) if found else None
        return {**asdict(t_interval(found)), "p_sign_flip": p, "by_seed": found}

    kinds = {k for one, other in pairs for k in one.success.keys() & other.success.keys()}
    return {
        "base": base,
        "arm": arm,
        "seeds": seeds,
        "success": {
            kind: difference(lambda run, kind=kind: run.success.get(kind))  # type: ignore[misc]
            for kind in ordered(kinds)
        },
        **{name: difference(partial(_measure, name=name)) for name in MEASURES},
        "mcnemar": _pooled_games(pairs),
    }


def _measure(run: Run, name: str) -> float | None:
    """The mean of a part of a curve: over all iterations, over the first or the last third."""
    tag, part, _ = MEASURES[name]
    _, values = run.curves.get(tag, ([], []))
    third = max(1, len(values) // 3)
    parts = {"all": values, "first third": values[:third], "last third": values[-third:]}
    return _mean(parts[part])


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _pooled_games(pairs: Sequence[tuple[Run, Run]]) -> dict[str, Any] | None:
    shared = [(one, two, game) for one, two in pairs for game in one.games.keys() & two.games]
    won = [(base.games[game], arm.games[game]) for base, arm, game in shared]
    gained, lost = won.count((False, True)), won.count((True, False))
    found = {"games": len(won), "gained": gained, "lost": lost, "p": mcnemar(gained, lost)}
    return found if won else None


def _folders(cfg: DictConfig) -> dict[str, dict[int, Path]]:
    """The folder of every run by arm and seed; what is missing is trained first."""
    if cfg.runs is not None:
        return given_runs(cfg)
    overrides = overrides_by_arm(cfg)
    folders: dict[str, dict[int, Path]] = {arm: {} for arm in cfg.arms}
    for seed in cfg.seeds:  # whole pairs first: what there is can be compared at any time
        for arm in cfg.arms:
            folder = Path(cfg.folder).absolute() / arm / f"seed_{seed}"
            folders[arm][seed] = finished_run(cfg, folder, overrides[arm], seed)
    return folders


def _read(cfg: DictConfig, arm: str, seed: int, folder: Path) -> Run:
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    played = {"success": summary["success_after"], "episodes": []}
    if cfg.games:
        played = _games(cfg, arm, seed, folder)
    success = {}
    if (after := played["success"]) is not None:
        success = {ALL: after["rate"]} | {k: v["rate"] for k, v in after["by_type"].items()}
    won = {episode["task"]: episode["won"] for episode in played["episodes"]}
    curves = read_curves(folder, (*CURVES, *EFFECTS, *MASSES))
    before = summary["success_before"] and summary["success_before"]["rate"]
    return Run(arm, seed, folder, success, curves, won, before)


def _games(cfg: DictConfig, arm: str, seed: int, run: Path) -> dict[str, Any]:
    """Every evaluation game's outcome with the final policy of ``run``, played once and kept."""
    target = Path(cfg.folder).absolute() / "evaluations" / arm / f"seed_{seed}"
    last = run / "checkpoints" / "last.ckpt"
    kept = target / "evaluation.json"
    if kept.is_file():
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        if found["checkpoint"] == str(last) and kept.stat().st_mtime > last.stat().st_mtime:
            return found
    target.mkdir(parents=True, exist_ok=True)
    log.info("%s: playing every evaluation game", run)
    stored = read_checkpoint(last)["aem_lightning"]["config"]
    # The run's own places, where its games and its warm-started model are.
    places = {**stored["paths"], "output_dir": str(target)}
    typed = [word for word in cfg.overrides if "._target_=" in word]
    about: Any = {"ckpt": str(last), "run": None, "seed": seed, "overrides": typed, "paths": places}
    return evaluate(checkpoint_wishes(OmegaConf.create(about)))


def _described(run: Run) -> dict[str, Any]:
    return {
        "arm": run.arm,
        "seed": run.seed,
        "folder": relative(run.folder),
        "before": run.before,
        "success": dict(run.success),
        **{name: _measure(run, name) for name in MEASURES},
        "curves": {tag: {"iteration": x, "value": y} for tag, (x, y) in run.curves.items()},
    }


def _scalars(content: Mapping[str, Any]) -> dict[str, float | None]:
    """Final success of each arm, and each pair's differences."""
    scalars = {}
    for arm, found in content["arms"].items():
        scalars[f"{arm}/success"] = found["success"].get(ALL, {}).get("value")
    for pair in content["pairs"]:
        name = f"{pair['arm']}_minus_{pair['base']}"
        scalars[f"{name}/success"] = pair["success"].get(ALL, {}).get("value")
        scalars |= {f"{name}/{key}": pair[key]["value"] for key in MEASURES}
    return scalars
