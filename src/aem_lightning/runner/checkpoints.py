"""Which checkpoint ``ckpt_path`` means."""

from __future__ import annotations

from pathlib import Path

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
