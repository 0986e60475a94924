"""Where AEM helps: arms on several settings, the interaction of two of them, and the forecast."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from scipy import stats

from aem_lightning.analysis.report import Picture, need_matplotlib, new_figure, write_report
from aem_lightning.analysis.statistics import sign_flip_test, t_interval
from aem_lightning.analysis.training import quoted
from aem_lightning.runner.summary import SUMMARY

log = logging.getLogger(__name__)

MEASURE = "train_success"  # over all iterations: the area under the curve
LAST = 5  # iterations whose success in training says where a run ended


def testbeds(cfg: DictConfig) -> dict[str, Any]:
    """Compare the arms on every setting, some at a time; runs that are finished are not run again.

    Raises:
        RuntimeError: The comparison of a setting failed; the others are finished first.
    """
    need_matplotlib()
    settings: dict[str, Any] = OmegaConf.to_container(cfg.settings, resolve=True)  # type: ignore[assignment]
    with ThreadPoolExecutor(cfg.jobs) as threads:
        ended = list(threads.map(lambda name: _compare(cfg, name, settings[name]), settings))
    if failed := [name for name, status in zip(settings, ended, strict=True) if status]:
        raise RuntimeError(f"{', '.join(failed)}: see {cfg.folder}/<setting>/compare.log")
    found = {name: _read(Path(cfg.folder) / name) for name in settings}
    content = {
        "settings": {name: _of_setting(each, cfg.arm) for name, each in found.items()},
        "interaction": interaction(*(found[name] for name in cfg.opposite), arm=cfg.arm),
        "opposite": list(cfg.opposite),
        "arm": cfg.arm,
    }
    return write_report(
        Path(cfg.folder),
        cfg.name,
        content,
        _draw(content),
        scalars={f"{n}/forecast": each["forecast"] for n, each in content["settings"].items()},
        table=_table(content),
    )


def interaction(one: Mapping[str, Any], other: Mapping[str, Any], *, arm: str) -> dict[str, Any]:
    """How much more ``arm`` gains over its base in one setting than in the other, by seed.

    Two reports of `compare`. The unit is a seed: Student's interval, and a test by sign flips.
    """
    first, second = (_by_seed(report, arm) for report in (one, other))
    found = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
    p = sign_flip_test(found) if found else None
    return {**asdict(t_interval(found)), "p_sign_flip": p, "by_seed": found}


def _by_seed(report: Mapping[str, Any], arm: str) -> dict[int, float]:
    pair = next(pair for pair in report["pairs"] if pair["arm"] == arm)
    return dict(zip(pair["seeds"], pair[MEASURE]["by_seed"], strict=True))


def _of_setting(report: Mapping[str, Any], arm: str) -> dict[str, Any]:
    """Differences of every arm, and the forecast of the base's runs beside the sign of ``arm``."""
    pairs = {pair["arm"]: {"seeds": pair["seeds"], **pair[MEASURE]} for pair in report["pairs"]}
    base = next(pair["base"] for pair in report["pairs"] if pair["arm"] == arm)
    summaries = [Path(run["folder"]) / SUMMARY for run in report["runs"] if run["arm"] == base]
    said = [json.loads(path.read_text(encoding="utf-8")).get("forecast") for path in summaries]
    known = [value for value in said if value is not None]
    forecast = sum(known) / len(known) if known else None
    effect = pairs[arm]["value"]
    right = forecast * effect < 0 if forecast is not None and effect is not None else None
    ends: dict[str, dict[int, float]] = {}
    for run in report["runs"]:
        last = run["curves"]["train/success_rate"]["value"][-LAST:]
        ends.setdefault(run["arm"], {})[run["seed"]] = sum(last) / len(last)
    return {
        "pairs": pairs,
        "base": base,
        "forecast": forecast,
        "called_right": right,
        "ends": ends,
    }


def _compare(cfg: DictConfig, name: str, setting: Mapping[str, Any]) -> int:
    """The exit status of a process that compares the arms on one setting."""
    folder = Path(cfg.folder).absolute() / name
    folder.mkdir(parents=True, exist_ok=True)
    words = {"overrides": setting.get("overrides", []), "arms": setting.get("arms", cfg.arms)}
    command = [
        *(sys.executable, "-m", "aem_lightning.analysis", "compare"),
        *(f"experiment={setting['experiment']}", f"folder={quoted(folder)}", "games=false"),
        *(f"{key}={_listed(value)}" for key, value in words.items()),
        f"seeds={_listed(setting.get('seeds', cfg.seeds))}",
        *(f"paths.{key}={quoted(cfg.paths[key])}" for key in ("root_dir", "data_dir", "log_dir")),
        *(
            f"+arm_overrides.{arm!s}={_listed(found)}"
            for arm, found in OmegaConf.to_container(cfg.arm_overrides).items()  # type: ignore[union-attr]
        ),
    ]
    log.info("%s: comparing, see %s/compare.log", name, folder)
    with (folder / "compare.log").open("a", encoding="utf-8") as output:
        return subprocess.run(command, stdout=output, stderr=output, check=False).returncode


def _listed(values: Sequence[Any]) -> str:
    return f"[{','.join(quoted(v) if isinstance(v, str) else str(v) for v in values)}]"


def _read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    return found


def _points(found: Mapping[str, Any]) -> str:
    """A difference of shares in points, with its interval and its p."""
    if found["value"] is None:
        return "–"
    low, high = (None if found[end] is None else 100 * found[end] for end in ("low", "high"))
    interval = "" if low is None else f" [{low:+.1f}, {high:+.1f}]"
    p = "" if found["p_sign_flip"] is None else f", p = {found['p_sign_flip']:.3f}"
    return f"{100 * found['value']:+.1f}{interval}{p}"


def _table(content: Mapping[str, Any]) -> str:
    lines = [
        "Success in training over all iterations: points to the base, by paired seeds.",
        "",
        "| setting | arm | seeds | difference | forecast | called right |",
        "|---|---|---:|---:|---:|---|",
    ]
    for name, setting in content["settings"].items():
        for arm, pair in setting["pairs"].items():
            tested = arm == content["arm"] and setting["forecast"] is not None
            said = f"{setting['forecast']:+.2f} | {setting['called_right']}" if tested else "|"
            cells = f"{name} | {arm} − {setting['base']} | {len(pair['seeds'])} | {_points(pair)}"
            lines.append(f"| {cells} | {said} |")
    lines += [
        "",
        f"Success in training over the last {LAST} iterations, and the seeds that end over 50 %.",
        "",
        "| setting | arm | at the end | seeds |",
        "|---|---|---:|---:|",
    ]
    for name, setting in content["settings"].items():
        for arm, by_seed in setting["ends"].items():
            values = list(by_seed.values())
            over, mean = sum(value > 0.5 for value in values), sum(values) / len(values)
            ends = stats.binomtest(over, len(values)).proportion_ci(method="wilson")
            share = f"{over} of {len(values)} [{100 * ends.low:.0f} %, {100 * ends.high:.0f} %]"
            lines.append(f"| {name} | {arm} | {100 * mean:.1f} % | {share} |")
    one, other = content["opposite"]
    lines += ["", f"Interaction, {one} − {other}: {_points(content['interaction'])}."]
    return "\n".join(lines)


def _draw(content: Mapping[str, Any]) -> Picture:
    settings = content["settings"]
    figure = new_figure(4.4 * len(settings), 4.8)
    panels = figure.subplots(1, len(settings), squeeze=False)[0]
    for axes, (name, setting) in zip(panels, settings.items(), strict=True):
        for place, pair in enumerate(setting["pairs"].values()):
            values = [100 * value for value in pair["by_seed"]]
            axes.plot([place] * len(values), values, "o", color=f"C{place}", alpha=0.4)
            if pair["low"] is not None:
                ends = [100 * pair["low"], 100 * pair["high"]]
                axes.plot([place, place], ends, color="black", linewidth=1.5)
            if pair["value"] is not None:
                axes.plot(place, 100 * pair["value"], "_", color="black", markersize=18)
        axes.axhline(0, color="0.7", linewidth=1)
        axes.set_xticks(range(len(setting["pairs"])), setting["pairs"], rotation=30, ha="right")
        axes.margins(x=0.15)
        axes.set_ylabel(f"success minus that of {setting['base']} (points)")
        forecast = setting["forecast"]
        said = (
            "" if forecast is None else f"\nforecast by {setting['base']}'s runs: {forecast:+.2f}"
        )
        axes.set_title(f"{name}{said}", fontsize=10)
    panels[0].plot([], [], "o", color="0.5", alpha=0.6, label="a seed")
    panels[0].plot([], [], color="black", marker="_", label="mean, 95 % interval over seeds")
    panels[0].legend(fontsize=8)
    title = "Success in training over all iterations, each arm against its base, paired by seed"
    figure.suptitle(title)
    return Picture(figure, title)
