"""The same runs on one, two and four ranks, which are forks of this process: it imports once.

python rank_runs.py MODEL FOLDER URL, where a server of vLLM's API answers
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from pathlib import Path

import torch
from runs import Keep, fit, toy_config, weights

SIZES = (1, 2, 4)
# SGD: what Adam makes of a gradient of nearly 0 depends on its last bits.
STEP = ("optimizer._target_=torch.optim.SGD", "optimizer.lr=0.1", "iterations=2", "evaluate=false")
SHARDED = "fsdp"
CASES = {
    # More tasks than the split has: a task is played in several groups, on several ranks.
    "repeated_tasks": ("tasks_per_iteration=12", "loss=kl_cov", "loss.covariance.ratio=0.1"),
    "new_tasks_for_uniform_groups": (
        "algorithm=dapo",
        "collection_rounds=4",
        "group_size=2",
        "callbacks=curriculum",
        "modulation.direction=shuffled",
    ),
    # Ranks have as many tasks, and other numbers of micro-batches.
    SHARDED: ("engine=vllm", "policy.gradient_checkpointing=true", "packing=packed"),
}
UPDATE = ("update_epochs=2", "num_minibatches=3", "micro_batch_tokens=64")


def play(case: str, size: int, model: str, folder: Path, url: str) -> dict[str, object]:
    """One rank of a run: what was sampled, in which place, and the last weights."""
    kind = "fsdp" if case == SHARDED else "ddp"
    ranks = (f"trainer={kind if size > 1 else 'default'}", "trainer.precision=32-true")
    resumes = case == SHARDED and size > 1
    keep, server = Keep(), (f"engine.url={url}", f"engine.adapter_dir={folder.parent}")
    given = (*CASES[case], *(server if case == SHARDED else ()))
    words = (*given, *STEP, *UPDATE, *ranks, f"trainer.devices={size}")
    cfg = toy_config(folder, model, *words)
    last = folder / "checkpoints" / "last.ckpt"
    if resumes:  # from what rank 0 alone has written
        fit(toy_config(folder, model, *words, "iterations=1"), callbacks=[keep])
    module = fit(cfg, callbacks=[keep], ckpt_path=last if resumes else None)
    frozen = [p for p in module.policy.parameters() if not p.requires_grad]
    sampled = {
        f"{done.index}/{t.round}/{t.task.id}/{t.group}/{t.copy}": [
            list(row[turn.start : turn.start + turn.length])
            for turn in t.turns
            for row in [t.rows[turn.row]]
        ]
        for done in keep.iterations
        for t in done.played
    }
    held = sum(getattr(parameter, "_local_tensor", parameter).numel() for parameter in frozen)
    return {"sampled": sampled, "weights": weights(module), "held": held}


def fork(rank: int, port: int, folder: Path, case: str, size: int, model: str, url: str) -> int:
    """The process id of a rank, which leaves what it has in ``folder``."""
    if process := os.fork():
        return process
    status = 1
    try:
        names = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if size > 1:
            values = (rank, 0, size, "127.0.0.1", port)
            os.environ |= dict(zip(names, map(str, values), strict=True))
        torch.save(play(case, size, model, folder / "run", url), folder / f"{rank}.pt")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main(model: str, folder: Path, url: str) -> None:
    """Every case with every number of ranks, below ``folder``."""
    torch.set_num_threads(1)
    for case in CASES:
        for size in SIZES[:2] if case == SHARDED else SIZES:
            place = folder / case / str(size)
            place.mkdir(parents=True)
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            ranks = [fork(rank, port, place, case, size, model, url) for rank in range(size)]
            if any([os.waitpid(rank, 0)[1] for rank in ranks]):
                sys.exit(f"{case} failed on {size} ranks")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
