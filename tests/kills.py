"""Runs that are killed at random moments and continued, beside one that was left alone.

Each is a fork of this process, which has imported everything: a run takes a second.
"""

from __future__ import annotations

import os
import random
import signal
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from runs import equal_bits, fit, toy_config, weights
from torch import Tensor

from aem_lightning.rollout import journal

RUN = ("iterations=4", "iterations_per_epoch=2", "update_epochs=2")


def start(folder: Path, model: str, *overrides: str) -> int:
    """A process that trains in ``folder``, from its last checkpoint on; it leaves its weights."""
    child = os.fork()
    if child:
        return child
    journal.TIME_SHARE = float("inf")  # a run of a second: its engine is saved at every pass
    try:
        last = folder / "checkpoints" / "last.ckpt"
        cfg = toy_config(folder, model, *RUN, *overrides)
        module = fit(cfg, ckpt_path=last if last.exists() else None)
        torch.save(weights(module), folder / "weights.part")
        os.replace(folder / "weights.part", folder / "weights.pt")
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def left(folder: Path) -> dict[str, Tensor]:
    """The weights that a run has left."""
    found: dict[str, Tensor] = torch.load(folder / "weights.pt", weights_only=True)
    return found


def killed_runs(
    folder: Path, model: str, kills: int, *overrides: str, seed: int = 0
) -> Iterator[tuple[int, bool]]:
    """Kill runs ``kills`` times; of each run how often, and whether it ended with the same bits."""
    chooser = random.Random(seed)
    began = time.monotonic()
    _, status = os.waitpid(start(folder / "whole", model, *overrides), 0)
    assert status == 0
    seconds = time.monotonic() - began
    done = number = 0
    while done < kills:
        number += 1
        run, killed = folder / f"killed_{number}", 0
        while not (run / "weights.pt").exists():
            child = start(run, model, *overrides)
            # The more often a run was killed the longer it may go on: a machine can grow busy.
            patience = chooser.uniform(0, 1 + killed / 3) * seconds if done < kills else 600.0
            deadline = time.monotonic() + patience
            while not (ended := os.waitpid(child, os.WNOHANG)[0]) and time.monotonic() < deadline:
                time.sleep(0.005)
            if not ended:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                done, killed = done + 1, killed + 1
        yield killed, equal_bits(left(folder / "whole"), left(run))
