"""What a run leaves behind: ``summary.json``, and a table in the terminal."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from aem_lightning.files import write_atomically

SUMMARY = "summary.json"
BAD_PREFLIGHT, LEARNT_NOTHING = 3, 4  # exit statuses


class StageClock:
    """Wall seconds of the stages of a run, in the order in which they came."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time the stage inside this context."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def learning_verdict(callbacks: Iterable[Any]) -> dict[str, Any] | None:
    """Why a run learnt nothing, as its `LearningWatch` found; ``None`` where it did learn."""
    verdicts = (getattr(callback, "verdict", None) for callback in callbacks)
    return next((asdict(verdict) for verdict in verdicts if verdict is not None), None)


def early_stop(callbacks: Iterable[Any]) -> str | None:
    """Why a callback ended the run before its time, in its words; ``None`` where none did."""
    told = (getattr(callback, "stopping_reason_message", None) for callback in callbacks)
    reason = next(filter(None, told), None)
    return reason and str(reason).removesuffix(" Signaling Trainer to stop.")


def forecast_of(callbacks: Iterable[Any]) -> float | None:
    """The run's `aem/forecast`, where a monitor of AEM has seen enough."""
    found = (getattr(callback, "forecast", None) for callback in callbacks)
    return next((value for value in found if value is not None), None)


def exit_status(cfg: Mapping[str, Any], summary: Mapping[str, Any]) -> int:
    """What a command ends with: 3 for a bad ``preflight=only``, 4 for a verdict under strict."""
    checked = summary.get("preflight")
    if cfg.get("preflight") == "only" and checked is not None and checked["verdict"]["bad"]:
        return BAD_PREFLIGHT
    return LEARNT_NOTHING if cfg.get("strict") and summary.get("verdict") else 0


def optimized(cfg: Mapping[str, Any], summary: Mapping[str, Any]) -> float | None:
    """What a search for settings compares runs by, where ``optimized_metric`` names it.

    It is NaN, a failed trial, where the run was not evaluated.
    """
    if cfg.get("optimized_metric") is None:
        return None
    return float((summary.get("success_after") or {}).get(cfg["optimized_metric"], "nan"))


def percent(result: Mapping[str, Any]) -> str:
    """A rate with its interval and its games, or episodes of one each, for people."""
    return (
        f"{100 * result['rate']:5.1f} %  [{100 * result['low']:.1f}, {100 * result['high']:.1f}]"
        f"  of {result.get('games', result['episodes'])}"
    )


def print_results(title: str, columns: Mapping[str, Mapping[str, Any]]) -> None:
    """A table of success rates: one column for each result, one row for each task type."""
    repeated = next((result for result in columns.values() if "games" in result), None)
    units = "episodes" if repeated is None else "games"
    table = Table(title=title, caption=f"success rate, Wilson 95 % interval, {units}")
    table.add_column("task type")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    table.add_row("all", *(percent(result) for result in columns.values()), end_section=True)
    for kind in sorted({kind for result in columns.values() for kind in result["by_type"]}):
        cells = (result["by_type"].get(kind) for result in columns.values())
        table.add_row(kind, *(percent(cell) if cell else "–" for cell in cells))
    Console().print(table)
    if repeated is not None:
        _print_passes(repeated)


def _print_passes(result: Mapping[str, Any]) -> None:
    """A table of pass@k and pass^k: one row for each task type."""
    table = Table(caption="% of games: won by one of k tries (pass@k), by all (pass^k)")
    table.add_column("task type")
    columns = [("pass_at_k", f"pass@{k}", k) for k in result["pass_at_k"]]
    columns += [("pass_hat_k", f"pass^{k}", k) for k in result["pass_hat_k"] if k != "1"]
    for _, shown, _ in columns:
        table.add_column(shown, justify="right")
    for kind, row in {"all": result, **result["by_type"]}.items():
        cells = [row[name].get(k) for name, _, k in columns]
        table.add_row(kind, *("–" if cell is None else f"{100 * cell:.1f}" for cell in cells))
    Console().print(table)


def print_counts(title: str, counts: Mapping[str, int]) -> None:
    """A table of counts, where there are any."""
    if counts:
        table = Table(title=title, show_header=False)
        for name, count in counts.items():
            table.add_row(name.replace("_", " "), f"{count:,}")
        Console().print(table)


def write_summary(folder: Path, summary: Mapping[str, Any]) -> Path:
    """Write ``summary.json`` and show the same to the person at the terminal."""
    target = folder / SUMMARY
    write_atomically(target, json.dumps(summary, indent=2))
    shown = {
        name: summary[name] for name in ("success_before", "success_after") if summary.get(name)
    }
    if shown:
        print_results(f"{summary['name']}: {summary['iterations']} iterations", shown)
    table = Table(title="wall time by stage", show_header=False)
    for stage, seconds in summary["seconds"].items():
        table.add_row(stage.replace("_", " "), f"{seconds:,.0f} s")
    console = Console()
    console.print(table)
    for name, path in summary["paths"].items():
        console.print(f"{name}: {path}", soft_wrap=True, highlight=False, markup=False)
    for line in summary["next"]:
        console.print("next:", Text(line, "bold"), soft_wrap=True, highlight=False)
    return target
