"""What to type after a run: commands that work as printed, with no environment activated."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from aem_lightning.runner.trust import typed_again


def command(*words: str) -> str:
    """``python`` and ``words`` for a shell in this folder.

    It names the interpreter that runs, unless that is the ``python`` which this shell finds.
    """
    running = Path(sys.executable)
    found = Path(shutil.which("python") or os.devnull).absolute()
    if found.parent == running.parent and found.samefile(running):
        return shlex.join(["python", *words])
    here = Path.cwd()
    name = running.relative_to(here) if running.is_relative_to(here) else running
    return shlex.join([str(name), *words])


def after_training(cfg: DictConfig, checkpoint: Path) -> list[str]:
    """The evaluation of ``checkpoint``, and the curves."""
    root, data = str(cfg.paths.root_dir), str(cfg.paths.data_dir)
    places = [] if root == os.environ.get("AEM_LIGHTNING_ROOT", ".") else [f"paths.root_dir={root}"]
    if data != f"{root}/data":  # else it would make the warm start again
        places.append(f"paths.data_dir={data}")
    return [
        command(_script("eval.py"), *places, *typed_again(cfg), f"ckpt_path={checkpoint}"),
        command("-m", "tensorboard.main", "--logdir", str(Path(cfg.paths.log_dir))),
    ]


def after_warm_start(model: Path) -> list[str]:
    """The run that goes on from ``model``: the overrides of this one, without its stage."""
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else ()
    kept = [word for word in given if not word.startswith(("stage=", "policy.model="))]
    words = [word.replace("alfworld_warm_start", "alfworld_aem") for word in kept]
    return [command(_script("train.py"), *words, f"policy.model={model}")]


def _script(name: str) -> str:
    """The script ``name``, which lies beside the one that runs."""
    beside = Path(sys.argv[0]).with_name(name)
    return str(beside) if beside.is_file() else name
