"""Which checkpoint ``ckpt_path`` means, and what it holds."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

SWEEP = "multirun_"  # how configs/paths/default.yaml begins the name of a sweep's folder


def find_checkpoint(cfg: DictConfig, run: str | None) -> Path | None:
    """The checkpoint file of ``cfg.ckpt_path``.

    ``last`` is the newest one of the runs named ``run``, or of all runs; jobs of sweeps are runs.
    A job of a sweep takes that of the same job, where the newest is one of an earlier sweep.

    Raises:
        FileNotFoundError: There is no such file, or no run has a checkpoint yet.
    """
    if cfg.ckpt_path is None:
        return None
    logs = Path(cfg.paths.log_dir)
    if cfg.ckpt_path == "last":
        found = _last_checkpoints(logs, run)
        if not found:
            raise FileNotFoundError(
                f"ckpt_path=last: no run under {logs / (run or '*')} has a checkpoint yet. Start "
                "one without ckpt_path, or give a file: ckpt_path=/path/to/last.ckpt"
            )
        return found[-1].absolute()
    path = Path(cfg.ckpt_path).expanduser()
    if not os.path.isfile(path):  # no error where the name is longer than names can be
        raise FileNotFoundError(
            f"ckpt_path={cfg.ckpt_path}: there is no such file. Checkpoints are in "
            f"{logs}/<name>/<time>/checkpoints/; ckpt_path=last takes the newest."
        )
    return path.absolute()


def _last_checkpoints(logs: Path, run: str | None) -> list[Path]:
    """Every ``last.ckpt`` that `find_checkpoint` may take, the newest at the end.

    Raises:
        FileNotFoundError: The newest is of a sweep that left nothing for this job of a sweep.
    """
    jobs = ("*", f"{SWEEP}*/**/*")  # a sweep's jobs may lie deeper: hydra.sweep.subdir
    runs = ["**"] if run is None else [f"{glob.escape(run)}/{job}" for job in jobs]
    names = [
        name
        for pattern in runs
        for name in glob.glob(
            f"{pattern}/checkpoints/last.ckpt", root_dir=logs, recursive=True, include_hidden=True
        )
    ]
    found = sorted((logs / name for name in names), key=lambda path: (path.stat().st_mtime, path))
    if not (HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN):
        return found
    mine, job = Path(HydraConfig.get().sweep.dir).absolute(), HydraConfig.get().sweep.subdir
    found = [path for path in found if not path.absolute().is_relative_to(mine)]
    folders = found[-1].parents if found else ()
    sweep = next((folder for folder in folders if folder.name.startswith(SWEEP)), None)
    if sweep is not None:
        found = [path for path in found if path.parents[1] == sweep / str(job)]
        if not found:
            raise FileNotFoundError(
                f"ckpt_path=last: job {job} of the sweep in {sweep} has no checkpoint. Give a "
                "file: ckpt_path=/path/to/last.ckpt"
            )
    return found


def needed_checkpoint(cfg: DictConfig, run: str | None) -> Path:
    """As `find_checkpoint`, where nothing can be done without one.

    Raises:
        FileNotFoundError: As there.
        ValueError: ``ckpt_path`` is null.
    """
    path = find_checkpoint(cfg, run)
    if path is None:
        raise ValueError("ckpt_path=null: type ckpt_path=/path/to/last.ckpt, or ckpt_path=last.")
    return path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What the checkpoint at ``path`` holds, its tensors on the CPU.

    Raises:
        ValueError: The file is damaged, no checkpoint of a run, or only a part of one.
    """
    # here: `find_checkpoint` answers before torch is imported
    from aem_lightning.runner.checkpoint_io import load_whole

    return load_whole(path)
