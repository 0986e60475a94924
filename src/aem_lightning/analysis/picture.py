"""A comparison as one picture to cite: the curves of the arms, and their differences with tests.

Drawn from what ``compare.json`` holds, so that a kept one can be drawn again.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aem_lightning.analysis.curves import Curve, mean_curve, smooth
from aem_lightning.analysis.report import new_figure
from aem_lightning.analysis.statistics import Estimate, t_interval
from aem_lightning.analysis.tables import ALL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Content = Mapping[str, Any]
# What is compared in points of success.
_DIFFERENCES = {
    "success": "after training",
    "train_success": "in training, all iterations",
    "val_success": "in all validations",
}
_LONGEST = 900  # characters of a caption that leave room for the curves


def draw_comparison(content: Content) -> Figure:
    """Success in training and in validation, entropy, and each arm minus its base."""
    rows = [*_rows(content)]
    figure = new_figure(11, 7.5 + 0.45 * max(0, len(rows) - 4))
    panels = figure.subplot_mosaic([["train", "val"], ["entropy", "pairs"]])
    _curves(panels["train"], content, "train/success_rate", lambda curve: _smoothed(curve))
    _curves(panels["entropy"], content, "aem/entropy", lambda curve: curve)
    # What is validated was updated since its index: by so many iterations.
    _curves(panels["val"], content, "val/success_rate", lambda c: ([x + 1 for x in c[0]], c[1]))
    _evaluations(panels["val"], content)
    _pairs(panels["pairs"], rows)
    end = max(map(_end, content["runs"]), default=0) or 1
    for name, title, label in (
        ("train", "Success in training (mean of the last 5 iterations)", "success rate"),
        ("val", "Success in validation and evaluation", "success rate"),
        ("entropy", "Entropy of a token in training", "entropy (nats)"),
    ):
        panels[name].set_title(title, fontsize=11)
        panels[name].set(ylabel=label, xlabel="iterations done")
        panels[name].set_ylim(0, None if name == "entropy" else 1)
        panels[name].set_xlim(-0.05 * end, 1.06 * end)
        panels[name].locator_params(axis="x", integer=True)
        if panels[name].get_legend_handles_labels()[0]:
            panels[name].legend(fontsize=8, loc="best")
    figure.suptitle(title_of(content), fontsize=13)
    caption = caption_of(content)
    if len(caption) > _LONGEST:
        caption = f"{caption[:_LONGEST]} … (whole in compare.json and in this file's metadata)"
    caption = "\n".join(textwrap.wrap(caption, 190))
    # A command may hold dollars, which are no formula.
    figure.supxlabel(caption, fontsize=8, x=0.01, ha="left", parse_math=False)
    return figure


def title_of(content: Content) -> str:
    """What is compared, in a line."""
    arms = [pair["arm"] for pair in content["pairs"]]
    bases = dict.fromkeys(pair["base"] for pair in content["pairs"])
    if not arms:
        return f"{', '.join(content['arms'])} on {content['experiment'] or 'given runs'}"
    where = f" on {content['experiment']}" if content["experiment"] else ""
    return f"{', '.join(arms)} against {', '.join(bases)}{where}"


def caption_of(content: Content) -> str:
    """How to read the picture and, where it is known, the command that makes it."""
    parts = ["Lines: means over seeds. Bands and bars: Student's 95 % interval over seeds."]
    if counts := [len(pair["seeds"]) for pair in content["pairs"] if pair["seeds"]]:
        least = min(1.0, 2 / 2 ** max(counts))
        parts.append(
            "Differences are paired by seed, a dot a seed; p: two-sided sign flips over seeds, of "
            f"which {max(counts)} pairs can give no less than {least:.2g}."
        )
    if command := content.get("command"):
        parts.append(f"Made by: {command}")
    return " ".join(parts)


def _smoothed(curve: Curve) -> Curve:
    """Of few episodes an iteration: noisier than its trend."""
    return curve[0], smooth(curve[1])


def _curves(axes: Axes, content: Content, tag: str, change: Callable[[Curve], Curve]) -> None:
    for number, arm in enumerate(content["arms"]):
        found = [run["curves"].get(tag) for run in content["runs"] if run["arm"] == arm]
        drawn = [each for each in found if each and each["iteration"]]
        curves = [change((each["iteration"], each["value"])) for each in drawn]
        xs, points = mean_curve(curves)
        if not xs:
            continue
        seeds = "1 seed" if len(curves) == 1 else f"{len(curves)} seeds, 95 % interval"
        color, marker = f"C{number}", "o" if tag.startswith("val/") else ""
        mean: list[Any] = [point.value for point in points]
        label = f"{arm} ({seeds})"
        axes.plot(xs, mean, color=color, marker=marker, markersize=4, label=label)
        if points[0].low is not None:
            lows: list[Any] = [point.low for point in points]
            highs: list[Any] = [point.high for point in points]
            axes.fill_between(xs, lows, highs, color=color, alpha=0.15, linewidth=0)


def _evaluations(axes: Axes, content: Content) -> None:
    """Squares: what each arm won of all evaluation games, before it was trained and after."""
    told: dict[str, None] = {}
    for number, arm in enumerate(content["arms"]):
        runs = [run for run in content["runs"] if run["arm"] == arm]
        end = max(map(_end, runs), default=0)
        before = [run["before"] for run in runs if run.get("before") is not None]
        after = [run["success"][ALL] for run in runs if ALL in run["success"]]
        for when, x, values in (("before", 0, before), ("after", end, after)):
            if values:
                place = x + 0.012 * end * (2 * number - len(content["arms"]) + 1)
                _bar(axes, place, t_interval(values, rates=True), color=f"C{number}")
                told["before (at 0)" if when == "before" else when] = None
    if told:
        label = f"all evaluation games, {' and '.join(told)} training"
        axes.plot([], [], "s", color="0.5", label=label)


def _end(run: Mapping[str, Any]) -> int:
    """The iterations that a run has done."""
    return 1 + max(run["curves"].get("train/success_rate", {}).get("iteration", ()), default=-1)


def _bar(axes: Axes, x: float, found: Estimate, *, color: str) -> None:
    value = found.value or 0.0
    bars = None
    if found.low is not None and found.high is not None:
        bars = [[max(0.0, value - found.low)], [max(0.0, found.high - value)]]
    axes.errorbar([x], [value], bars, color=color, fmt="s", capsize=3)


def _rows(content: Content) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Of every pair and measure that is known: the arms, the measure in words, the difference."""
    for pair in content["pairs"]:
        for name, label in _DIFFERENCES.items():
            found = pair["success"].get(ALL) if name == "success" else pair[name]
            if found is not None and found["value"] is not None:
                yield f"{pair['arm']} − {pair['base']}", label, found


def _pairs(axes: Axes, rows: Sequence[tuple[str, str, Mapping[str, Any]]]) -> None:
    names = [*dict.fromkeys(name for name, *_ in rows)]
    of = f": {names[0]}" if len(names) == 1 else ""
    axes.set_title(f"Difference in success, paired by seed{of}", fontsize=11)
    axes.set_xlabel("difference (points)")
    axes.axvline(0, color="0.7", linewidth=1)
    for place, (name, label, found) in enumerate(rows):
        color = f"C{names.index(name) + 1}"
        seeds = [100 * value for value in found["by_seed"]]
        axes.plot(seeds, [place] * len(seeds), "o", color=color, alpha=0.35, markersize=4)
        if found["low"] is not None:
            ends = [100 * found["low"], 100 * found["high"]]
            axes.plot(ends, [place, place], color=color, linewidth=2)
        axes.plot(100 * found["value"], place, "D", color=color, markersize=6)
        words = label if len(names) == 1 else f"{name}, {label}"
        said = f"{words}: {_said(found)}"
        where = axes.get_yaxis_transform()  # x from 0 to 1
        axes.text(0.02, place - 0.25, said, fontsize=8, va="center", transform=where)
    axes.set_yticks([])
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.6)
    if not rows:
        axes.text(0.5, 0, "no seed that two arms have", ha="center", transform=axes.transAxes)


def _said(found: Mapping[str, Any]) -> str:
    value, ends = 100 * found["value"], [found["low"], found["high"]]
    low, high = (None if end is None else 100 * end for end in ends)
    interval = "" if low is None else f" [{low:+.1f}, {high:+.1f}]"
    p = "" if found["p_sign_flip"] is None else f", p = {found['p_sign_flip']:.2g}"
    return f"{value:+.1f}{interval}{p}, {found['count']} seeds".replace("-", "−")
