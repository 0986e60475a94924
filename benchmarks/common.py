"""What every benchmark does: write JSON, print a table, fit how costs grow, guard ratios."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_json(path: str | Path | None, results: Mapping[str, Any]) -> None:
    """Write ``results`` to ``path``; nothing where there is no path."""
    if path is not None:
        Path(path).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def growth_exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of log cost over log size, by least squares: 1 is linear growth.

    Example:
        >>> round(growth_exponent([1, 2, 4], [3.0, 6.0, 12.0]), 6)
        1.0
    """
    x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    if spread == 0:
        raise ValueError(f"sizes={list(sizes)}: growth needs at least two different sizes")
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print ``rows`` below ``columns``, aligned."""
    texts = [[_text(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *texts, strict=True)]
    print(f"\n{title}")
    for row in (list(columns), *texts):
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def _text(cell: Any) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
