"""The same runs on several numbers of ranks, which are forks of this process: it imports once.

python rank_runs.py MODEL FOLDER
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig
from runs import Keep, fit, toy_config, weights
from toy import MemoryRunsOut

STEP = (
    # SGD: what Adam makes of a gradient of nearly 0 depends on its last bits.
    "optimizer._target_=torch.optim.SGD",
    "optimizer.lr=0.1",
    "scheduler=constant",
    "iterations=2",
    "evaluate=false",
    "datamodule._target_=local_coin.LocalCoin",  # no process beside each rank
    "datamodule.validation_tasks=3",
    "update_epochs=2",
    "num_minibatches=2",
    "micro_batch_tokens=128",
)
CASES = {
    # More tasks than the split has: a task is played in two groups, on two ranks.
    "grpo_aem": (
        "tasks_per_iteration=5",
        "+datamodule.sizes={train: 4, valid_seen: 4, valid_unseen: 4}",
        "iterations_per_epoch=1",
        "memory=window",
        "loss=kl_cov",
        "loss.covariance.ratio=0.1",
    ),
    "ppo_and_new_tasks_for_uniform_groups": (
        "tasks_per_iteration=3",
        "algorithm=ppo",
        "collection_rounds=4",
        "group_size=2",
        "callbacks=curriculum",
        "modulation.direction=shuffled",
    ),
}
# How many ranks play a case beside one. Shares are uneven, and of four ranks one has no task.
SIZES = {"grpo_aem": 2, "ppo_and_new_tasks_for_uniform_groups": 4}
RESUMED = 3  # the first case is begun on two ranks, and continued on so many
FIRST = "first.ckpt"  # after one iteration


class KeepFirst(L.Callback):
    """Keeps the checkpoint of a run's first iteration."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        folder = Path(trainer.default_root_dir)
        if pl_module.iteration == 1 and trainer.ckpt_path is None and trainer.is_global_zero:
            shutil.copy(folder / "checkpoints" / "last.ckpt", folder / FIRST)


def play(cfg: DictConfig, checkpoint: Path | None) -> dict[str, Any]:
    """One rank of a run: what was sampled, in which place, and the last weights."""
    keep = Keep()
    others = [KeepFirst(), MemoryRunsOut(rank=1, after=2)]
    module = fit(cfg, callbacks=[keep, *others], ckpt_path=checkpoint)
    sampled = {
        f"{done.index}/{t.round}/{t.task.id}/{t.group}/{t.copy}": [
            list(row[turn.start : turn.start + turn.length])
            for turn in t.turns
            for row in [t.rows[turn.row]]
        ]
        for done in keep.iterations
        for t in done.played
    }
    return {"sampled": sampled, "weights": weights(module), "tasks_played": module.tasks_played}


def fork(
    rank: int, size: int, port: int, folder: Path, play: Callable[..., Any], *given: Any
) -> int:
    """The process id of a rank, which leaves in ``folder`` what ``play`` returns there."""
    if process := os.fork():
        return process
    status = 1
    try:
        names = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if size > 1:
            values = (rank, 0, size, "127.0.0.1", port)
            os.environ |= dict(zip(names, map(str, values), strict=True))
        torch.save(play(*given), folder / f"{rank}.pt")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def on_ranks(size: int, folder: Path, play: Callable[..., Any], *given: Any) -> None:
    """``play`` as each of ``size`` ranks; the process ends where one of them fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [fork(rank, size, port, folder, play, *given) for rank in range(size)]
    if any([os.waitpid(process, 0)[1] for process in processes]):
        sys.exit(f"{folder} failed on {size} ranks")


def run(case: str, size: int, folder: Path, model: str, checkpoint: Path | None = None) -> None:
    """A case on ``size`` ranks, in ``folder``."""
    strategy = "auto" if size == 1 else "ddp"
    ranks = (f"trainer.strategy={strategy}", f"trainer.devices={size}")
    cfg = toy_config(folder / "run", model, *STEP, *CASES[case], *ranks)
    on_ranks(size, folder, play, cfg, checkpoint)


def main(model: str, folder: Path) -> None:
    """Every case with every number of ranks, below ``folder``, and the resumed run."""
    torch.set_num_threads(1)
    for case, several in SIZES.items():
        for size in (1, several):
            run(case, size, folder / case / str(size), model)
    case, begun = next(iter(SIZES.items()))
    first = folder / case / str(begun) / "run" / FIRST
    run(case, RESUMED, folder / case / "resumed", model, first)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
