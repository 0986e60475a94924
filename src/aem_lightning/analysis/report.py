"""What an analysis leaves: a figure, its numbers, a table for people, TensorBoard entries."""

from __future__ import annotations

import json
import logging
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from torch.utils.tensorboard import SummaryWriter

from aem_lightning.runner.next_steps import config_folders, typed_overrides
from aem_lightning.runner.shipped import as_typed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

# Where a report lies, which is nobody else's.
_PLACES = re.compile(r"\+*(folder|paths\.\w+)=")


@dataclass(frozen=True)
class Picture:
    """A figure with what its files say of it, for those who meet it elsewhere."""

    figure: Figure
    title: str
    caption: str = ""

    def save(self, folder: Path, name: str) -> None:
        """Write it as PNG and, for print, as PDF; the same picture gives the same bytes."""
        words = {"Title": self.title, "Author": "aem_lightning"}
        self.figure.savefig(
            folder / f"{name}.png", dpi=120, metadata={**words, "Description": self.caption}
        )
        words |= {"Subject": self.caption}
        # None: else the time of day is in it.
        self.figure.savefig(folder / f"{name}.pdf", metadata={**words, "CreationDate": None})


def typed_command() -> str | None:
    """What to type for an analysis again, its folders left out; ``None`` for one from Python."""
    if not HydraConfig.initialized():
        return None
    kind, _, config = (HydraConfig.get().job.config_name or "").partition("/")
    if kind != "analysis":
        return None
    words = [word.replace("+typed_experiment=", "experiment=") for word in typed_overrides()]
    kept = [word for word in words if not _PLACES.match(word)]
    if "name=ablations" in kept:  # a comparison with arms of its own
        config = "ablations"
        kept.remove("name=ablations")
    given = " ".join(map(_quoted, [config, *config_folders(), *kept]))
    return as_typed(f"python -m aem_lightning.analysis {given}")


def _quoted(word: str) -> str:
    """A word as a person would quote it: in double quotes where it holds single ones."""
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)


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
    picture: Picture,
    *,
    scalars: Mapping[str, float | None],
    table: str | None = None,
) -> dict[str, Any]:
    """Write ``<name>.json``, its picture, with a table ``<name>.md``, and TensorBoard entries.

    Of the ``scalars``, which become ``analysis/<name>/<key>``, ``None`` is left out. Returns
    ``content``, which is plain data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, allow_nan=False)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    picture.save(folder, name)
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for key, value in scalars.items():
            if value is not None:
                writer.add_scalar(f"analysis/{name}/{key}", value, 0)
        writer.add_figure(f"analysis/{name}", picture.figure, 0)
        if table is not None:
            writer.add_text(f"analysis/{name}/table", table, 0)
    if table is not None:
        (folder / f"{name}.md").write_text(table + "\n", encoding="utf-8")
        log.info("%s:\n%s", name, table)
    log.info("written: %s/%s.{json,png,pdf}", folder, name)
    return dict(content)
