"""The hyperparameters of a run, for every logger."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

# Where a run is written to, and what looks on: nothing to compare runs by.
LEFT_OUT = ("callbacks", "logger", "paths")
METRIC = "val/success_rate"


class Hyperparameters(Callback):
    """Hands the module's ``config`` to the loggers: ``hparams.yaml``, TensorBoard's HPARAMS.

    The table of TensorBoard's tab shows each run beside its last ``val/success_rate``. It takes a
    metric only together with a value, so the run joins the table at its first validation.
    """

    def __init__(self) -> None:
        self._in_table = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before Lightning writes ``hparams.yaml``, which it does once."""
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(_chosen(pl_module), {})  # no metric: no table yet
            else:
                logger.log_hyperparams(_chosen(pl_module))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the run into TensorBoard's table, beside the point that Lightning itself logs."""
        rate = trainer.callback_metrics.get(METRIC)
        if self._in_table or rate is None or rate.isnan():
            return
        self._in_table = True
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                last: Any = pl_module.iteration
                logger.log_hyperparams(_chosen(pl_module), {METRIC: rate}, step=last - 1)


def _chosen(pl_module: LightningModule) -> dict[str, Any]:
    agent: Any = pl_module
    return {name: value for name, value in agent.config.items() if name not in LEFT_OUT}
