"""The commands ``aem-train``, ``aem-eval`` and ``aem-configs``; the first two are also scripts."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from aem_lightning.runner.cli import accept_plus, quiet_libraries
from aem_lightning.runner.command import Command, configs_of
from aem_lightning.runner.early import check_evaluation, check_training
from aem_lightning.runner.played import as_training, contradiction, plays_model
from aem_lightning.runner.shipped import as_typed, shipped
from aem_lightning.runner.signals import stoppable

TRAIN = "Train an LLM agent: ``python train.py experiment=quickstart``."
EVAL = """Play all evaluation games, with a checkpoint: ``python eval.py ckpt_path=last``.

With a model, as it is or with an adapter, on any experiment (options: ``python train.py --help``):
``python eval.py experiment=alfworld policy.model=FOLDER``, ``python eval.py adapter=FOLDER ...``.
With one behind an endpoint: ``python eval.py policy=api base_url=... model=...``.
"""


def train() -> None:
    """Run one training run, with the overrides on the command line."""
    with stoppable():
        given = accept_plus(sys.argv[1:])
        command = Command(configs_of(given), "train", "python train.py", TRAIN, check_training)
        command.run(given, _train)


def evaluate() -> None:
    """Run one evaluation, with the overrides on the command line."""
    with stoppable():
        given, name = sys.argv[1:], "eval"
        if told := contradiction(given):
            sys.exit(as_typed(told))
        if plays_model(given):
            given, name = as_training(given), "train"
        command = Command(configs_of(given), name, "python eval.py", EVAL, check_evaluation)
        command.run(given, _evaluate)


def _train(cfg: DictConfig) -> float | None:
    from aem_lightning.runner import train  # imports torch: after the checks
    from aem_lightning.runner.summary import exit_status, optimized

    quiet_libraries()
    summary = train(cfg)
    if status := exit_status(cfg, summary):
        sys.exit(status)
    return optimized(cfg, summary)


def _evaluate(cfg: DictConfig) -> None:
    from aem_lightning.runner import evaluate  # imports torch: after the checks

    quiet_libraries()
    evaluate(cfg)


def copy_configs(arguments: Sequence[str] | None = None) -> None:
    """Copy the files of all options into a folder that is not there yet."""
    parser = argparse.ArgumentParser(
        prog="aem-configs", description="Copy the files of all options into a folder, to edit them."
    )
    parser.add_argument("folder", type=Path, help="a folder that is not there yet")
    folder = parser.parse_args(arguments).folder
    try:
        shutil.copytree(shipped("configs"), folder)
    except FileExistsError:
        sys.exit(f"{folder} is there already, and nothing in it is overwritten. Name another one")
    except OSError as error:
        sys.exit(f"{folder}: {error}")
    typed = shlex.join(["--config-dir", str(folder)])
    Console(soft_wrap=True, highlight=False, markup=False).print(
        f"{folder}: a copy of every option's file; those that you do not edit may be deleted.\n"
        + as_typed(f"Type python train.py experiment=quickstart {typed}: its files come first.")
    )
