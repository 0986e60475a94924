"""Which checkpoint ``ckpt_path`` means, and what it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig


def find_checkpoint(cfg: DictConfig, run: str | None) -> Path | None:
    """The checkpoint file of ``cfg.ckpt_path``.

    ``last`` is the newest one of the runs named ``run``, or of all runs.

    Raises:
        FileNotFoundError: There is no such file, or no run has a checkpoint yet.
    """
    if cfg.ckpt_path is None:
        return None
    logs = Path(cfg.paths.log_dir)
    if cfg.ckpt_path == "last":
        found = list(logs.glob(f"{run or '*'}/*/checkpoints/last.ckpt"))
        if not found:
            raise FileNotFoundError(
                f"ckpt_path=last: no run under {logs / (run or '*')} has a checkpoint yet. Start "
                "one without ckpt_path, or give a file: ckpt_path=/path/to/last.ckpt"
            )
        return max(found, key=lambda path: path.stat().st_mtime).absolute()
    path = Path(cfg.ckpt_path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"ckpt_path={cfg.ckpt_path}: there is no such file. Checkpoints are in "
            f"{logs}/<name>/<time>/checkpoints/; ckpt_path=last takes the newest."
        )
    return path.absolute()


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
