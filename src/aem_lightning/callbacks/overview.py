"""Four questions to a run: does it learn, does it explore, is it stable, where does time go."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.types import STEP_OUTPUT

from aem_lightning.callbacks.outputs import iteration_of
from aem_lightning.callbacks.step_time import total_seconds

GROUP = "0_overview"

# TensorBoard's CUSTOM SCALARS: a question, its charts, and the curves of each, as expressions.
CHARTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "Is it learning?": {
        "success, training and validation": ("train/success_rate", "val/success_rate"),
        "return, training and validation": ("train/return", "val/return"),
        "success by task type, validation": (r"val/success_rate/.*",),
        "groups that differ, the only ones to learn from": ("rollout/mixed_groups",),
    },
    "Is it exploring?": {
        "entropy of tokens, nats": ("aem/entropy",),
        "entropy of responses that are made likelier, less likely": (
            "aem/entropy_positive",
            "aem/entropy_negative",
        ),
        "change of entropy": ("aem/entropy_drift",),
        "AEM's alpha: mean, least, greatest": ("aem/alpha_mean", "aem/alpha_min", "aem/alpha_max"),
    },
    "Is it stable?": {
        "KL: of the update, from the start": ("policy/approx_kl", "policy/ref_kl"),
        "share of tokens clipped": ("policy/clip_fraction",),
        "norm of the gradient": ("policy/grad_norm",),
        "engine and trainer apart, nats a token": ("policy/sampler_gap",),
        "actions malformed, inadmissible": ("rollout/malformed_rate", "rollout/inadmissible_rate"),
        "tokens a response": ("rollout/response_tokens",),
    },
    "Where does the time go?": {
        "seconds an iteration": ("time/total",),
        "share of each stage": (r"time/share_.*",),
        "tokens a second": ("time/tokens_per_second",),
    },
}


class Overview(Callback):
    """The same four questions on the first page of whoever shows curves.

    Pages sort curves by name and open the first group, so the few curves that answer are written
    once more under names that come first: ``0_overview/1_success_train`` and so on, by the number
    of the question, short enough for a card's title. A table (csv) is no page and is left alone.
    TensorBoard gets `CHARTS` too, where validation lies over training.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lay out the charts."""
        for logger in trainer.loggers if trainer.is_global_zero else ():
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(layout())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, *_: Any
    ) -> None:
        """Write what the iteration says of each question."""
        iteration = iteration_of(outputs)
        if iteration is None:
            return
        shown, metrics, seconds = trainer.callback_metrics, iteration.metrics, iteration.seconds
        total = total_seconds(seconds)
        found = {
            "1_success_train": shown.get("success"),
            "2_entropy": shown.get("entropy"),
            "2_mixed_groups": shown.get("mixed_groups"),
            "3_approx_kl": metrics.get("policy/approx_kl"),
            "3_clip_fraction": metrics.get("policy/clip_fraction"),
            "3_grad_norm": metrics.get("policy/grad_norm"),
            "4_seconds": total,
            "4_share_rollout": seconds.get("rollout", 0.0) / total if total else None,
            "4_share_update": seconds.get("update", 0.0) / total if total else None,
        }
        self._write(trainer, found, iteration.index)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write success in validation, beside that in training."""
        agent: Any = pl_module
        found = trainer.callback_metrics.get("val/success_rate")
        if not trainer.sanity_checking:
            self._write(trainer, {"1_success_val": found}, agent.iteration)

    def _write(self, trainer: Trainer, found: Mapping[str, Any], step: int) -> None:
        known = {name: float(value) for name, value in found.items() if value is not None}
        known = {f"{GROUP}/{name}": of for name, of in known.items() if math.isfinite(of)}
        for logger in trainer.loggers if trainer.is_global_zero and known else ():
            if not isinstance(logger, CSVLogger):
                logger.log_metrics(dict(known), step=step)


def layout() -> dict[str, dict[str, list[Any]]]:
    """`CHARTS` as TensorBoard's writer takes them: an expression has to match a whole name."""
    return {
        question: {
            title: ["Multiline", [f"{name}$" for name in names]] for title, names in charts.items()
        }
        for question, charts in CHARTS.items()
    }
