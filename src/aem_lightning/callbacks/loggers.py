"""Writers to whatever loggers a trainer has: none, one or several.

Scalars go to every logger. Histograms and texts go to those whose experiment knows them, as
TensorBoard's does; the others are passed over. Only rank zero writes. Steps are iteration numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor


def log_scalars(trainer: Trainer, metrics: Mapping[str, float], step: int) -> None:
    """Write ``metrics`` at iteration ``step`` to every logger."""
    if not trainer.is_global_zero or not metrics:
        return
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=step)


def log_histogram(trainer: Trainer, name: str, values: Tensor, step: int) -> None:
    """Write a histogram of the finite ``values``; nothing where none is finite."""
    finite = values.detach().float().cpu()
    finite = finite[finite.isfinite()]
    for write in _writers(trainer, "add_histogram") if len(finite) else ():
        write(name, finite, step)


def log_text(trainer: Trainer, name: str, markdown: str, step: int) -> None:
    """Write a text in markdown."""
    for write in _writers(trainer, "add_text"):
        write(name, markdown, step)


def _writers(trainer: Trainer, method: str) -> Iterator[Callable[..., Any]]:
    for logger in trainer.loggers if trainer.is_global_zero else ():
        write = getattr(getattr(logger, "experiment", None), method, None)
        if callable(write):
            yield write
