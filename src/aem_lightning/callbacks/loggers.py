"""Writers to whatever loggers a trainer has: none, one or several.

Scalars go to every logger. A histogram or a text goes to each in the form that it has for one:

=========== =============================== ======================================
logger      histogram                       text
=========== =============================== ======================================
TensorBoard a histogram                     a text
wandb       a histogram                     a table of one row
mlflow      five quantiles, as metrics      a markdown file among the artifacts
csv         five quantiles, as columns      a row of ``texts.csv`` beside the table
another     as TensorBoard's, where its experiment has the methods; else neither
=========== =============================== ======================================

Only rank zero writes. Steps are iteration numbers.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, WandbLogger
from torch import Tensor

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def log_scalars(trainer: Trainer, metrics: Mapping[str, float], step: int) -> None:
    """Write ``metrics`` at iteration ``step`` to every logger."""
    if not trainer.is_global_zero or not metrics:
        return
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=step)


def log_histogram(trainer: Trainer, name: str, values: Tensor, step: int) -> None:
    """Write a histogram of the finite ``values``; nothing where none is finite."""
    if not trainer.is_global_zero or not trainer.loggers:
        return
    finite = values.detach().float().cpu()
    finite = finite[finite.isfinite()]
    for logger in trainer.loggers if len(finite) else ():
        if isinstance(logger, WandbLogger):
            _wandb_histogram(logger, name, finite, step)
        elif isinstance(logger, CSVLogger | MLFlowLogger):
            logger.log_metrics(quantiles(name, finite), step=step)
        elif (write := _method(logger, "add_histogram")) is not None:
            write(name, finite, step)


def log_text(trainer: Trainer, name: str, markdown: str, step: int) -> None:
    """Write a text in markdown."""
    for logger in trainer.loggers if trainer.is_global_zero else ():
        if isinstance(logger, WandbLogger):
            logger.log_text(name, ["iteration", "markdown"], [[str(step), markdown]], step=step)
        elif isinstance(logger, MLFlowLogger):
            _mlflow_text(logger, name, markdown, step)
        elif isinstance(logger, CSVLogger):
            _csv_text(logger, name, markdown, step)
        elif (write := _method(logger, "add_text")) is not None:
            write(name, markdown, step)


def quantiles(name: str, values: Tensor) -> dict[str, Any]:
    """A histogram as numbers.

    >>> quantiles("aem/alpha", torch.arange(101.0))["aem/alpha/p25"]
    25.0
    """
    found = torch.quantile(values, torch.tensor(QUANTILES)).tolist()
    return {f"{name}/p{round(100 * q):02d}": at for q, at in zip(QUANTILES, found, strict=True)}


def _wandb_histogram(logger: WandbLogger, name: str, values: Tensor, step: int) -> None:
    import wandb

    drawn: Any = wandb.Histogram(values.tolist())
    logger.log_metrics({name: drawn}, step=step)


def _mlflow_text(logger: MLFlowLogger, name: str, markdown: str, step: int) -> None:
    logger.experiment.log_text(str(logger.run_id), markdown, f"{name}/{step:06d}.md")


def _csv_text(logger: CSVLogger, name: str, markdown: str, step: int) -> None:
    path = Path(logger.log_dir) / "texts.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        if not file.tell():
            writer.writerow(("step", "name", "text"))
        writer.writerow((step, name, markdown))


def _method(logger: Any, name: str) -> Callable[..., Any] | None:
    method = getattr(getattr(logger, "experiment", None), name, None)
    return method if callable(method) else None
