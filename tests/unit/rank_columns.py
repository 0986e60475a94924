"""One of two ranks: its half of a batch through everything that looks at the whole batch."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from aem_lightning.algorithms import AEM, EMPG, GRPO, PPO, ReinforcePP
from aem_lightning.modules import RolloutSettings, batching
from aem_lightning.modules.dynamic_sampling import check_fit, why_all_broke
from aem_lightning.modules.reporting import environment_metrics, rollout_metrics
from aem_lightning.types import Iteration, RolloutBatch, Task, Trajectory, Turn

LENGTHS = [[2, 1], [3], [1, 1, 4], [2], [2, 2]]  # tokens of the responses of five trajectories
SPLITS = (2, 0)  # trajectories of the first rank, which may have none


def make_trajectories() -> list[Trajectory]:
    """Five episodes of the second collection round; something broke the second."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for n, lengths in enumerate(LENGTHS):
        turns = []
        for row, length in enumerate(lengths):
            entropies = torch.rand(length, generator=generator).tolist()
            action = None if row else "a"
            turns.append(Turn("o", (), "r", action, row, 1, [-1.0] * length, entropies))
        turns[-1].reward = float(n * n)
        rows = [[1] * (1 + length) for length in lengths]
        made.append(Trajectory(Task("t"), n, 0, turns, rows, won=n == 4, round=n // 4))
    made[1].infra_error = "died"
    return made


def make_batch(part: slice) -> RolloutBatch:
    """The batch of some of the trajectories, with values."""
    settings = RolloutSettings(group_size=1)
    encoder: Any = SimpleNamespace(pad_id=7)
    batch = batching.make_batch(make_trajectories()[part], settings, AEM(), encoder)
    batch.values = batch.entropies.clone()
    return batch


def everything(batch: RolloutBatch) -> dict[str, Tensor]:
    """What the estimators and modulations of the whole batch give, a row a response or token."""
    ppo, inside = PPO(), batch.response_index >= 0
    gated = AEM(scope="trajectory", min_range=0.3)(batch).gated
    batch.value_targets = ppo.targets(batch)
    advantages = GRPO(normalize_std=False, min_group_size=1)(batch) + batch.entropy
    return {
        "reinforcepp": ReinforcePP()(batch),
        "ppo": ppo(batch)[inside],
        "aem": AEM(scope="batch", mean="token")(batch).alpha,
        "aem_shuffled": AEM(scope="batch", direction="shuffled")(batch).alpha,
        "gated": torch.full_like(batch.entropy, gated),
        "empg": EMPG(zeta=0.5)(batch).apply(advantages, batch),
    }


def metrics(part: slice) -> dict[str, float]:
    """What an iteration of all ranks reports, of which this one has played some episodes."""
    batch, none = make_batch(part), torch.zeros(0)
    done = Iteration(0, make_trajectories()[part], batch, none, none, 0.0, {}, {})
    pool = SimpleNamespace(counters=lambda: {"graded": 3, "tampered": batch.num_trajectories % 2})
    return rollout_metrics(done) | environment_metrics(pool)


def judge_what_broke(rank: int) -> None:
    """Episodes of a rank that all broke are not all that broke, nor is it all that does not fit."""
    too_long = Trajectory(Task("t"), 0, 0, truncated=True, infra_error="too long")
    whole = make_trajectories()[:1]
    mine = [too_long] if rank else whole
    assert why_all_broke(mine) is None
    check_fit(mine)
    assert why_all_broke([too_long]) == "all 2 episodes broke, the last: too long"
    assert why_all_broke([too_long] * rank) == "all 1 episodes broke, the last: too long"
    with pytest.raises(ValueError, match="too long"):
        check_fit([too_long] * rank)


def main(rank: int, folder: Path) -> None:
    """Compute on this rank's trajectories, and leave the result in ``folder``."""
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    for split in SPLITS:
        part = slice(split) if rank == 0 else slice(split, None)
        found = everything(make_batch(part)), metrics(part)
        torch.save(found, folder / f"{split}_{rank}.pt")
    judge_what_broke(rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
