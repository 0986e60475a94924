"""The same run with a whole policy in one process, and with its layers shared by two ranks.

python sharded_runs.py MODEL FOLDER URL, where a server of vLLM's API answers
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from rank_runs import on_ranks
from runs import Keep, fit, toy_config, weights

# Ranks have as many tasks, and other numbers of micro-batches.
WORDS = (
    *("engine=vllm", "policy.gradient_checkpointing=true", "packing=packed"),
    # SGD: what Adam makes of a gradient of nearly 0 depends on its last bits.
    *("optimizer._target_=torch.optim.SGD", "optimizer.lr=0.1", "iterations=2", "evaluate=false"),
    *("update_epochs=2", "num_minibatches=3", "micro_batch_tokens=64", "trainer.precision=32-true"),
)


def play(size: int, model: str, folder: Path, url: str) -> dict[str, Any]:
    """One rank of a run: what was sampled, in which place, the last weights, what it holds."""
    keep = Keep()
    ranks = (f"trainer={'fsdp' if size > 1 else 'default'}", f"trainer.devices={size}")
    server = (f"engine.url={url}", f"engine.adapter_dir={folder.parent}")
    words = (*WORDS, *ranks, *server)
    last = None
    if size > 1:  # from what rank 0 alone has written
        fit(toy_config(folder, model, *words, "iterations=1"), callbacks=[keep])
        last = folder / "checkpoints" / "last.ckpt"
    module = fit(toy_config(folder, model, *words), callbacks=[keep], ckpt_path=last)
    sampled = {
        f"{done.index}/{t.task.id}/{t.group}/{t.copy}": [list(row) for row in t.rows]
        for done in keep.iterations
        for t in done.played
    }
    frozen = [p for p in module.policy.parameters() if not p.requires_grad]
    held = sum(getattr(parameter, "_local_tensor", parameter).numel() for parameter in frozen)
    return {"sampled": sampled, "weights": weights(module), "held": held}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for size in (1, 2):
        place = Path(sys.argv[2]) / str(size)
        place.mkdir(parents=True)
        on_ranks(size, place, play, size, sys.argv[1], place / "run", sys.argv[3])
