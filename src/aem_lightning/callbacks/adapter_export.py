"""The export of a run's adapter as a folder that PEFT loads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch import Callback, LightningModule, Trainer

from aem_lightning.files import sync_tree


class SavesAdapter(Protocol):
    """What the export asks of a policy."""

    def save_adapter(self, path: Path) -> None:
        """Write weights, config and tokenizer files into the folder ``path``."""


class AdapterExport(Callback):
    """The adapter as ``<folder>/adapter``, renewed with each checkpoint and at the end of training.

    ``PeftModel.from_pretrained(base, folder)`` loads it without this package. The folder is written
    under another name and then renamed, so a reader never meets half of one; a run that is killed
    between the two renames leaves the former adapter as ``adapter.old``, which the next run puts
    back. Rank zero writes.

    Args:
        folder: The parent of ``adapter``; the trainer's ``default_root_dir`` when ``None``.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self._folder = folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is an adapter to save before anything is trained.

        Raises:
            TypeError: The module has no ``policy.save_adapter``.
        """
        if stage != "fit":
            return
        _policy(pl_module)
        if trainer.is_global_zero:
            recover(self.path(trainer))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Export beside the checkpoint that is being saved, or the last weights."""
        if trainer.is_global_zero:
            export_adapter(_policy(pl_module), self.path(trainer))

    on_train_end = on_save_checkpoint

    def path(self, trainer: Trainer) -> Path:
        """The folder that the adapter is exported to."""
        return Path(self._folder or trainer.default_root_dir) / "adapter"


def export_adapter(policy: SavesAdapter, path: Path) -> None:
    """Save the adapter of ``policy`` as the folder ``path``, whole, over a former one."""
    fresh, old = _beside(path, "new"), _beside(path, "old")
    recover(path)
    fresh.mkdir(parents=True)
    try:
        policy.save_adapter(fresh)
        sync_tree(fresh)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if path.exists():
        os.replace(path, old)
    os.replace(fresh, path)
    shutil.rmtree(old, ignore_errors=True)


def recover(path: Path) -> None:
    """Clear away what a killed export left beside ``path``; put a former adapter back."""
    fresh, old = _beside(path, "new"), _beside(path, "old")
    if fresh.exists():
        shutil.rmtree(fresh)
    if not old.exists():
        return
    if path.exists():
        shutil.rmtree(old)
    else:
        os.replace(old, path)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f"{path.name}.{ending}")


def _policy(pl_module: LightningModule) -> SavesAdapter:
    policy: Any = getattr(pl_module, "policy", None)
    if not callable(getattr(policy, "save_adapter", None)):
        raise TypeError(
            "AdapterExport needs a module with `policy.save_adapter(path)`; "
            f"{type(pl_module).__name__} has none. Use a policy with an adapter, or leave the "
            "callback out with `~callbacks.adapter_export`."
        )
    saves: SavesAdapter = policy
    return saves
