"""The hyperparameters of a run, for every logger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

# Where a run is written to, and what looks on: nothing to compare runs by.
LEFT_OUT = ("callbacks", "logger", "paths")
METRIC = "val/success_rate"


class Hyperparameters(Callback):
    """Hands the module's ``config`` to the loggers: ``hparams.yaml``, TensorBoard's HPARAMS.

    The table of TensorBoard's tab shows each run beside its last ``val/success_rate``.
    """

    def __init__(self) -> None:
        self._is_told = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before Lightning writes ``hparams.yaml``, which it does once: at the first evaluation."""
        if self._is_told:
            return
        self._is_told = True
        agent: Any = pl_module
        chosen = {name: value for name, value in agent.config.items() if name not in LEFT_OUT}
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(chosen)
                continue
            logger.log_hyperparams(chosen, {})  # a metric would add a point to its curve
            if trainer.is_global_zero:
                for summary in hparams(dict(_flat(chosen)), {METRIC: 0.0}):  # names the column
                    logger.experiment._get_file_writer().add_summary(summary)


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values under ``node`` as ``outer/inner``; a list or nothing as its text."""
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value if isinstance(value, bool | int | float) else str(value)
