"""The cost table: what share of an iteration each stage takes, beside the paper's shares."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from aem_lightning.analysis.inputs import TIMES, find_run
from aem_lightning.analysis.report import need_matplotlib, new_figure, write_report
from aem_lightning.callbacks.step_time import CostRow, cost_table, table_markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
        _draw(rows),
        scalars={f"share_{row.stage}": row.share for row in rows},
        table=table_markdown(rows),
    )


def _draw(rows: list[CostRow]) -> Figure:
    figure = new_figure(7, 0.5 * len(rows) + 1)
    axes = figure.subplots()
    places = range(len(rows))
    shares = [100 * row.share for row in rows]
    paper = [100 * (row.paper_share or 0) for row in rows]
    axes.barh([i - 0.2 for i in places], shares, 0.4, label="this run")
    axes.barh([i + 0.2 for i in places], paper, 0.4, label="paper", color="0.7")
    axes.set_yticks(list(places), [row.label for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("share of an iteration (%)")
    axes.legend()
    return figure
