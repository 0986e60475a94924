"""The cost table: what share of an iteration each stage takes, beside the paper's shares."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from aem_lightning.analysis.inputs import TIMES, find_run
from aem_lightning.analysis.report import Picture, need_matplotlib, new_figure, write_report
from aem_lightning.callbacks.step_time import CostRow, cost_table, table_markdown

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def cost(cfg: DictConfig) -> dict[str, Any]:
    """Write the cost table of the run folder ``cfg.run``."""
    need_matplotlib()
    run = find_run(cfg)
    stored = json.loads((run / TIMES).read_text(encoding="utf-8"))
    rows = cost_table({stage["stage"]: stage["seconds"] for stage in stored["stages"]})
    content = {
        "run": str(run),
        "iterations": stored["iterations"],
        "seconds_per_iteration": stored["seconds"] / max(1, stored["iterations"]),
        "stages": [asdict(row) for row in rows],
    }
    return write_report(
        Path(cfg.paths.output_dir),
        "cost",
        content,
        _draw(rows, f"Where an iteration's time goes: mean of {stored['iterations']}"),
        scalars={f"share_{row.stage}": row.share for row in rows},
        table=table_markdown(rows),
    )


def _draw(rows: list[CostRow], title: str) -> Picture:
    figure = new_figure(7, 0.5 * len(rows) + 1.4)
    axes = figure.subplots()
    for place, row in enumerate(rows):
        seconds = f"{100 * row.share:.1f} % ({row.seconds:,.1f} s in all)"
        _bar(axes, place - 0.2, row.share, "C0", seconds, "this run" if place == 0 else None)
        given = "not given" if row.paper_share is None else f"{100 * row.paper_share:.1f} %"
        label = "paper (arXiv 2605.00425)" if place == 0 else None
        _bar(axes, place + 0.2, row.paper_share or 0.0, "0.7", given, label)
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.3)
    axes.set(xlabel="share of an iteration's wall time (%)", title=title)
    axes.legend(loc="center right")
    return Picture(figure, title)


def _bar(axes: Axes, place: float, share: float, color: str, said: str, label: str | None) -> None:
    bar = axes.barh([place], [100 * share], 0.4, color=color, label=label)
    axes.bar_label(bar, [said], padding=3, fontsize=7)
