"""What an analysis leaves: a figure, its numbers, a table for people, TensorBoard entries."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.tensorboard import SummaryWriter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)


def need_matplotlib() -> None:
    """Find out before hours of runs, not after them, that no figure can be drawn.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "The analyses draw figures with matplotlib, which is missing: "
            "pip install 'aem-lightning[notebooks]'"
        ) from error


def new_figure(width: float, height: float) -> Figure:
    """An empty figure that belongs to no window and needs no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def relative(path: Path) -> str:
    """From the working directory where that is possible: a report says nothing of its machine."""
    here, there = Path.cwd(), path.absolute()
    return str(there.relative_to(here) if there.is_relative_to(here) else path)


def write_report(
    folder: Path,
    name: str,
    content: Mapping[str, Any],
    figure: Figure,
    *,
    scalars: Mapping[str, float | None],
    table: str | None = None,
) -> dict[str, Any]:
    """Write ``<name>.json``, ``<name>.png``, with a table ``<name>.md``, and TensorBoard entries.

    Of the ``scalars``, which become ``analysis/<name>/<key>``, ``None`` is left out. Returns
    ``content``, which is plain data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, allow_nan=False)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    figure.savefig(folder / f"{name}.png", dpi=120)
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for key, value in scalars.items():
            if value is not None:
                writer.add_scalar(f"analysis/{name}/{key}", value, 0)
        writer.add_figure(f"analysis/{name}", figure, 0)
        if table is not None:
            writer.add_text(f"analysis/{name}/table", table, 0)
    if table is not None:
        (folder / f"{name}.md").write_text(table + "\n", encoding="utf-8")
        log.info("%s:\n%s", name, table)
    log.info("written: %s/%s.{json,png}", folder, name)
    return dict(content)
