"""What only a run itself can tell of where it came from: ``run.json``, written when it starts."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
from collections.abc import Mapping
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig

import aem_lightning
from aem_lightning.card import ORIGIN
from aem_lightning.files import write_atomically
from aem_lightning.runner.next_steps import config_folders, typed_overrides
from aem_lightning.runner.shipped import CHECKOUT, as_typed

PACKAGES = ("torch", "lightning", "transformers", "peft")
# Nothing of the user's own settings takes part, and nothing of the checkout is touched.
_GIT = ("git", "-c", "safe.directory=*", "--no-optional-locks")


def write_origin(
    folder: Path,
    trainer: L.Trainer,
    games: Mapping[str, str],
    *,
    name: str | None,
    seed: int,
    script: str = "train",
) -> None:
    """Write ``run.json``, which `aem_lightning.card.run_card` reads; rank zero alone does."""
    if not trainer.is_global_zero:
        return
    content = {
        "name": name,
        "seed": seed,
        "command": typed_command(script),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": _device(trainer),
        "versions": {
            "python": platform.python_version(),
            **{package: metadata.version(package) for package in PACKAGES},
            "aem_lightning": aem_lightning.__version__,
        },
        **commit_of(CHECKOUT),
        "games": dict(games),
    }
    write_atomically(folder / ORIGIN, json.dumps(content, indent=2) + "\n")


def typed_command(script: str = "train") -> str | None:
    """What to type to run the same again, in another folder; ``None`` for a run from Python.

    An evaluation of a model reads a training's config, so the config does not tell the ``script``.
    """
    if not HydraConfig.initialized():
        return None
    if HydraConfig.get().job.config_name not in ("train", "eval"):  # of an analysis: not this run
        return None
    typed = typed_overrides()
    kept = [word for word in typed if not word.lstrip("+").startswith("paths.output_dir=")]
    return f"{as_typed(f'python {script}.py')} {shlex.join([*config_folders(), *kept])}".strip()


def commit_of(checkout: Path) -> dict[str, Any]:
    """The ``commit`` of a checkout and whether it is ``dirty``: changed, or with files of its own.

    Of a folder that is no checkout, or where there is no git, both are ``None``.
    """
    nothing = {"commit": None, "dirty": None}
    if not (checkout / ".git").exists():  # an installed package may lie inside another repository
        return nothing
    try:
        commit, changes = (
            subprocess.run(
                [*_GIT, "-C", str(checkout), *words],
                capture_output=True,
                text=True,
                check=True,
                timeout=20,
            ).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.SubprocessError):
        return nothing
    return {"commit": commit, "dirty": bool(changes)}


def _device(trainer: L.Trainer) -> str:
    root, count = trainer.strategy.root_device, trainer.world_size
    name = f"{root.type.upper()}, {torch.get_num_threads()} threads"
    if root.type == "cuda":
        name = torch.cuda.get_device_name(root)
    return name if count == 1 else f"{count} × {name}"
