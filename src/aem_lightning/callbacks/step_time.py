"""The cost table of a run: where the seconds of an iteration go, beside the paper's shares."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT

from aem_lightning.callbacks.loggers import log_scalars, log_text
from aem_lightning.callbacks.outputs import iteration_of
from aem_lightning.files import write_atomically

logger = logging.getLogger(__name__)

INSIDE_ROLLOUT = "environment"

# In words, and the paper's part (arXiv 2605.00425, the cost analysis), which does not tell the
# environment apart from the rollout.
STAGES: Mapping[str, tuple[str, float | None]] = {
    "rollout": ("rollout", 0.459),
    INSIDE_ROLLOUT: ("environment (inside rollout)", None),
    "old_logprobs": ("old log-prob", 0.082),
    "ref_logprobs": ("reference log-prob", 0.086),
    "advantage": ("base advantage", 0.002),
    "modulation": ("AEM", 0.011),
    "update": ("update", 0.360),
}


@dataclass(frozen=True, slots=True)
class CostRow:
    """One stage of the cost table.

    Attributes:
        stage: Key of ``Iteration.seconds``.
        label: The stage in words.
        seconds: Wall time over all iterations so far.
        share: Part of the total, 0 to 1. The environment is inside rollout, not counted again.
        paper_share: The paper's part, ``None`` where it gives none.
    """

    stage: str
    label: str
    seconds: float
    share: float
    paper_share: float | None


class StepTime(Callback):
    """The paper's cost table: a curve an iteration, a text and ``step_time.json`` at the end.

    Curves: ``time/{stage}`` in seconds, ``time/total`` and ``time/share_{stage}``; and
    ``time/tokens_per_second``, response tokens over the seconds of the whole iteration. Both are
    those of rank zero. The running totals are part of the checkpoint, so a resumed run's table
    covers the whole run.

    Args:
        folder: Where ``step_time.json`` goes; the trainer's ``default_root_dir`` when ``None``.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self._folder = folder
        self._totals: dict[str, float] = {}
        self._iterations = 0
        self._index = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, *_: Any
    ) -> None:
        """Log and add up the seconds of the iteration that ended."""
        iteration = iteration_of(outputs)
        if iteration is None:
            return
        self._iterations += 1
        self._index = iteration.index
        for stage, seconds in iteration.seconds.items():
            self._totals[stage] = self._totals.get(stage, 0.0) + seconds
        rows = cost_table(iteration.seconds)
        metrics = {f"time/{row.stage}": row.seconds for row in rows}
        metrics |= {f"time/share_{row.stage}": row.share for row in rows}
        metrics["time/total"] = total = total_seconds(iteration.seconds)
        if total > 0:
            tokens = sum(turn.length for episode in iteration.played for turn in episode.turns)
            metrics["time/tokens_per_second"] = tokens / total
        log_scalars(trainer, metrics, step=iteration.index)

    def state_dict(self) -> dict[str, Any]:
        """The running totals."""
        return {
            "totals": dict(self._totals),
            "iterations": self._iterations,
            "index": self._index,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the totals of an earlier run."""
        self._totals = dict(state_dict["totals"])
        self._iterations = state_dict["iterations"]
        self._index = state_dict["index"]

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        """Write the table of the run, or of what was done before it broke or was stopped."""
        rows = cost_table(self._totals)
        if not rows or not trainer.is_global_zero:
            return
        markdown = table_markdown(rows)
        log_text(trainer, "time/table", markdown, step=self._index)
        path = Path(self._folder or trainer.default_root_dir) / "step_time.json"
        content = {
            "iterations": self._iterations,
            "seconds": total_seconds(self._totals),
            "stages": [asdict(row) for row in rows],
        }
        write_atomically(path, json.dumps(content, indent=2) + "\n")
        logger.info("Cost table over %d iterations, in %s:\n%s", self._iterations, path, markdown)

    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        self.on_train_end(trainer)


def total_seconds(seconds: Mapping[str, float]) -> float:
    """Seconds of all stages, with the environment counted once (inside rollout)."""
    return sum(value for stage, value in seconds.items() if stage != INSIDE_ROLLOUT)


def cost_table(seconds: Mapping[str, float]) -> list[CostRow]:
    """Rows of ``Iteration.seconds`` in the paper's order, then any stage that it does not know."""
    total = total_seconds(seconds)
    rows = []
    for stage in sorted(seconds, key=[*STAGES, *seconds].index):
        label, paper_share = STAGES.get(stage, (stage, None))
        share = seconds[stage] / total if total > 0 else 0.0
        rows.append(CostRow(stage, label, seconds[stage], share, paper_share))
    return rows


def table_markdown(rows: Sequence[CostRow]) -> str:
    """The cost table as a markdown table."""
    lines = ["| stage | seconds | share | paper |", "|---|---:|---:|---:|"]
    for row in rows:
        paper = "–" if row.paper_share is None else f"{100 * row.paper_share:.1f} %"
        lines.append(f"| {row.label} | {row.seconds:.2f} | {100 * row.share:.2f} % | {paper} |")
    return "\n".join(lines)
