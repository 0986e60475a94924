"""What the benchmarks share: tables, a JSON file with them, a growth exponent."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

GROWTH_LIMIT = 1.1  # 1 is linear; the rest is for noise

# Every table that this process printed, as it was shown: a report repeats them.
SHOWN: list[dict[str, Any]] = []


def write_json(path: str | Path | None, results: Mapping[str, Any]) -> None:
    """Write ``results``, the tables shown and the machine to ``path``; ``None`` is nowhere."""
    if path is None:
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    machine = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    content = json.dumps({"machine": machine, **results, "tables": SHOWN}, indent=2)
    target.write_text(content + "\n", encoding="utf-8")


def growth_exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The k of ``cost ~ size^k``: the least-squares slope of log cost over log size."""
    if len(sizes) != len(costs) or len(set(sizes)) < 2:
        raise ValueError(f"two different sizes are needed, got {list(sizes)} and {list(costs)}")
    x, y = ([math.log(value) for value in values] for values in (sizes, costs))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return slope / sum((a - mean_x) ** 2 for a in x)


def operations(
    model: PreTrainedModel, tokens: int, before: int = 0, *, backward: bool = False
) -> float:
    """Floating-point operations of a pass over ``tokens`` that follow ``before`` others.

    Two a weight and token, and four a layer, channel and pair of a token with one that it sees
    (arXiv 2204.02311, appendix B): of a long sequence, the second part grows with its square. A
    backward pass through frozen weights, as under LoRA, costs their part once more; attention's
    costs two and a half times the forward pass, as it makes the scores again (arXiv 2205.14135).
    """
    shape = model.config
    pairs = tokens * before + tokens * tokens / 2
    weights = 2.0 * model.num_parameters() * tokens
    attention = 4.0 * shape.num_hidden_layers * shape.hidden_size * pairs
    return 2.0 * weights + 3.5 * attention if backward else weights + attention


def print_growth(title: str, exponents: Mapping[str, float]) -> bool:
    """Exponents on the terminal, each beside the limit; whether all keep it."""
    rows = [(name, k, "yes" if k <= GROWTH_LIMIT else "NO") for name, k in exponents.items()]
    print_table(title, ("as it grows", "exponent", f"at most {GROWTH_LIMIT}"), rows)
    return all(k <= GROWTH_LIMIT for k in exponents.values())


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on the terminal: the first column is words, the others are figures."""
    cells = [[_shown(cell) for cell in row] for row in rows]
    SHOWN.append({"title": title, "columns": list(columns), "rows": cells})
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in cells:
        table.add_row(*row)
    Console().print(table)


def _shown(cell: Any) -> str:
    if cell is None:
        return "–"
    return (
        f"{cell:,.3g}"
        if isinstance(cell, float) and abs(cell) < 1000
        else f"{cell:,.0f}"
        if (isinstance(cell, float | int))
        else str(cell)
    )
