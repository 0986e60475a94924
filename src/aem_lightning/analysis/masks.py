"""Analysis B: what happens to entropy when only one side of AEM's effect is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from aem_lightning.analysis.curves import Curve, read_curves, smooth
from aem_lightning.analysis.report import Picture, need_matplotlib, new_figure, write_report
from aem_lightning.analysis.training import finished_run

ENTROPY = "aem/entropy"
# AEM, trained on the responses with one sign of A(alpha - 1) only.
KEEP = (
    "modulation=custom",
    "modulation._target_=aem_lightning.analysis.keep.Keep",
    "+modulation.modulation={_target_: aem_lightning.algorithms.AEM}",
)
LABELS = {
    "positive": "trained on A(α−1) > 0 alone: entropy should fall",
    "negative": "trained on A(α−1) < 0 alone: entropy should rise",
}


def masks(cfg: DictConfig) -> dict[str, Any]:
    """Train both runs and compare their entropies."""
    need_matplotlib()
    folder = Path(cfg.folder)
    curves = {}
    for sign in LABELS:
        arm = [f"+modulation.sign={sign}", *KEEP]
        run = finished_run(cfg, folder / sign, arm, cfg.seed)
        curves[sign] = read_curves(run, (ENTROPY,))[ENTROPY]
    content = {
        "experiment": cfg.experiment,
        "iterations": cfg.iterations,
        "seed": cfg.seed,
        **divergence(curves["positive"], curves["negative"]),
        "entropy": {sign: {"iteration": x, "value": y} for sign, (x, y) in curves.items()},
    }
    names = ("change_positive", "change_negative", "gap_end")
    return write_report(
        folder,
        "masks",
        content,
        _draw(curves, f"Each side of AEM's effect alone: {cfg.experiment}, seed {cfg.seed}"),
        scalars={key: content[key] for key in names},
    )


def divergence(positive: Curve, negative: Curve, last: int = 5) -> dict[str, float | None]:
    """How far the two entropy curves came from their start and from each other, in nats.

    ``change_*`` is the mean of the last iterations minus the first one, which both runs share;
    ``gap_end`` the negative run's mean of the last iterations minus the positive run's. The end is
    averaged over ``last`` iterations, of short runs over half of them.
    """
    found: dict[str, float | None] = dict.fromkeys(
        ("change_positive", "change_negative", "gap_end")
    )
    ends = []
    for sign, (_, values) in (("positive", positive), ("negative", negative)):
        if values:
            count = max(1, min(last, len(values) // 2))
            ends.append(sum(values[-count:]) / count)
            found[f"change_{sign}"] = ends[-1] - values[0]
    return found | ({"gap_end": ends[1] - ends[0]} if len(ends) == 2 else {})


def _draw(curves: dict[str, Curve], title: str) -> Picture:
    figure = new_figure(7, 4)
    axes = figure.subplots()
    for number, (sign, (xs, ys)) in enumerate(curves.items()):
        axes.plot(xs, ys, color=f"C{number}", alpha=0.3)
        axes.plot(xs, smooth(ys), color=f"C{number}", label=LABELS[sign])
    axes.plot([], [], color="0.4", label="mean of the last 5 iterations")
    axes.plot([], [], color="0.4", alpha=0.3, label="each iteration")
    axes.set(xlabel="iterations done", ylabel="entropy of a token in training (nats)", title=title)
    axes.legend(fontsize=8)
    return Picture(figure, title)
