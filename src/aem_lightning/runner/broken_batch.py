"""What is kept of a run that met a number which is none: a file, and the command that shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from aem_lightning.rollout import NotFiniteError
from aem_lightning.runner.next_steps import command
from aem_lightning.types import TROUBLESHOOTING


class BrokenBatch(Callback):
    """Keeps the batch and the weights of a `NotFiniteError` in the run's folder.

    The file ``not_finite_<iteration>_<rank>.pt`` loads with ``weights_only=True``. Where it lies,
    the command that computes on it again, and whether there is a checkpoint go behind the error.
    """

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if not isinstance(exception, NotFiniteError):
            return
        agent: Any = pl_module
        folder = Path(trainer.default_root_dir).absolute()
        path = folder / f"not_finite_{agent.iteration}_{trainer.global_rank}.pt"
        weights = {name: on_cpu(p) for name, p in agent.policy.trainable().items()}
        content = {
            "said": str(exception),
            "iteration": agent.iteration,
            "config": agent.config,
            "weights": weights,
            "kept": {name: on_cpu(value) for name, value in exception.kept.items()},
        }
        torch.save(content, path)
        broken = [n for n, p in agent.policy.named_parameters() if not p.isfinite().all()]
        if broken:
            exception.add_note(f"Weights that are not finite: {len(broken)}, the first {broken[0]}")
        again = command("-m", "aem_lightning.analysis", "batch", f"file={path}")
        see = f"{TROUBLESHOOTING}#a-number-is-not-finite"
        exception.add_note(f"Kept: {path}\nThe same again: {again}\nSee {see}")
        last = folder / "checkpoints" / "last.ckpt"
        exception.add_note(
            f"The last checkpoint: ckpt_path={last}"
            if last.is_file()
            else "This run has no checkpoint yet: it starts anew"
        )


def on_cpu(value: Any) -> Any:
    """A tensor on the CPU, detached; anything else as it is."""
    return value.detach().cpu() if isinstance(value, Tensor) else value
