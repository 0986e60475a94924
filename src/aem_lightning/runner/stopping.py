"""What a training run does when a signal stops it: the last whole iteration is kept."""

from __future__ import annotations

import logging
import os
import subprocess
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig

from aem_lightning.files import write_atomically
from aem_lightning.runner.next_steps import to_continue
from aem_lightning.runner.signals import Stopped, StopSignals

log = logging.getLogger(__name__)


class KeepLastIteration(Callback):
    """``last.ckpt`` of the last whole iteration when a signal stops the run.

    An iteration whose update has begun is finished, since its weights are half changed; one that
    has not come so far is dropped, and a resumed run plays it again. Rank zero writes, without the
    others, which may be anywhere.

    Args:
        cfg: The run's config, for the command that goes on.
        signals: The handlers of this process.
    """

    def __init__(self, cfg: DictConfig, signals: StopSignals) -> None:
        self._cfg, self._signals = cfg, signals
        self._last = Path(cfg.paths.output_dir).absolute() / "checkpoints" / "last.ckpt"
        self._is_training = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals back, which Lightning has just taken over, and its requeue signal."""
        self._listen(trainer)
        self._is_training = True
        agent: Any = pl_module
        agent.committing = self._hold
        if trainer.is_global_zero and "SLURM_JOB_ID" in os.environ:  # which may start it once more
            known = [self._last, *([trainer.ckpt_path] if trainer.ckpt_path else [])]
            write_atomically(_note(self._cfg), "\n".join(map(str, known)))

    def on_test_start(self, trainer: Trainer, *_: Any) -> None:
        """Take the signals back."""
        self._listen(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Between iterations nothing is half done."""
        self._signals.release()

    on_validation_start = on_train_epoch_end = on_train_batch_start

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What follows changes no weights, and the last checkpoint is written."""
        self._is_training = False
        self._signals.told = self._how_to_go_on(pl_module)
        self._signals.release()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save, and say at which iteration and how to go on."""
        if not isinstance(exception, Stopped) or not trainer.is_global_zero:
            return
        if self._is_training:
            self._signals.held = True
            # Not trainer.save_checkpoint, where ranks wait for each other.
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            trainer.strategy.save_checkpoint(checkpoint, self._last)
            self._signals.held = False
            exception.told = self._how_to_go_on(pl_module)
        environment = trainer._accelerator_connector.cluster_environment
        if exception.signal in _requeue_signals(environment):
            exception.told += f" ({requeue()})"

    def _how_to_go_on(self, pl_module: LightningModule) -> str:
        command = to_continue(self._cfg, self._last)
        return f"stopped after iteration {pl_module.iteration}. To go on, type: {command}"

    def _hold(self) -> None:
        self._signals.held = True

    def _listen(self, trainer: Trainer) -> None:
        self._signals.install(*_requeue_signals(trainer._accelerator_connector.cluster_environment))


def _requeue_signals(environment: object) -> list[int]:
    """What SLURM sends ahead of a time limit or a preemption, where Lightning is to requeue."""
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return []
    return [environment.requeue_signal] if environment.requeue_signal else []


def requeue() -> str:
    """Ask SLURM to run this job again, which then goes on; what came of it."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    except OSError as error:
        return f"SLURM was not asked to requeue the job: {error}"
    if done.returncode:
        return f"SLURM did not requeue job {job}: {done.stderr.strip()}"
    return f"SLURM requeues job {job}"


def requeued_checkpoint(cfg: DictConfig) -> Path | None:
    """Where the same command goes on, in a job that SLURM has started once more.

    That is its own checkpoint, or the one that it had gone on from itself: after a time limit, a
    preemption, or the loss of a machine.
    """
    if os.environ.get("SLURM_RESTART_COUNT", "0") == "0" or not _note(cfg).is_file():
        return None
    known = map(Path, _note(cfg).read_text(encoding="utf-8").splitlines())
    checkpoint = next((path for path in known if path.is_file()), None)
    if checkpoint is not None:
        log.info("SLURM has started this job once more: it goes on from %s", checkpoint)
    return checkpoint


def _note(cfg: DictConfig) -> Path:
    run = str(cfg.name).replace("/", "_")  # a job may hold several
    return Path(cfg.paths.log_dir) / f".slurm_{os.environ.get('SLURM_JOB_ID')}_{run}"
