"""One of two ranks: its half of a batch through everything that looks at the whole batch."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from aem_lightning.algorithms import AEM, EMPG, GRPO, PPO, ReinforcePP
from aem_lightning.modules.reporting import over_ranks
from aem_lightning.rollout.packing import pack
from aem_lightning.types import RolloutBatch, Task, Trajectory, Turn

LENGTHS = [[2, 1], [3], [1, 1, 4], [2], [2, 2]]  # tokens of the responses of five trajectories
SPLITS = (2, 0)  # trajectories of the first rank, which may have none


def make_batch(part: slice) -> RolloutBatch:
    """The batch of some of the trajectories, with values."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for n, lengths in enumerate(LENGTHS):
        turns = []
        for row, length in enumerate(lengths):
            entropies = torch.rand(length, generator=generator).tolist()
            turns.append(Turn("o", (), "r", "a", row, 1, [-1.0] * length, entropies))
        turns[-1].reward = float(n * n)
        rows = [[1] * (1 + length) for length in lengths]
        made.append(Trajectory(Task("t"), n, 0, turns, rows))
    made[1].infra_error = "died"
    batch = pack(made[part], may_be_empty=True)
    batch.values = batch.entropies.clone()
    return batch


def everything(batch: RolloutBatch) -> dict[str, Tensor]:
    """What the estimators and modulations of the whole batch give, a row a response or token."""
    ppo, inside = PPO(), batch.response_index >= 0
    batch.value_targets = ppo.targets(batch)
    advantages = GRPO(normalize_std=False, min_group_size=1)(batch) + batch.entropy
    return {
        "reinforcepp": ReinforcePP()(batch),
        "ppo": ppo(batch)[inside],
        "aem": AEM(scope="batch", mean="token")(batch).alpha,
        "aem_shuffled": AEM(scope="batch", direction="shuffled")(batch).alpha,
        "empg": EMPG(zeta=0.5)(batch).apply(advantages, batch),
    }


def averaged(rank: int) -> dict[str, float]:
    """Metrics of two ranks of which the first has nothing to average."""
    judged = Trajectory(Task("t"), 0, 0, [Turn("o", (), "r", "a", 0, 1, [-1.0], [1.0])], [[1, 2]])
    broken = Trajectory(Task("t"), 0, 0, infra_error="died")
    metrics = {"rollout/infra_errors": 2.0 - rank, "rollout/mixed_groups": float(rank)}
    mine = [broken, broken] if rank == 0 else [judged, judged, broken]
    return over_ranks(metrics | ({"train/return": 5.0} if rank else {}), mine)


def main(rank: int, folder: Path) -> None:
    """Compute on this rank's trajectories, and leave the result in ``folder``."""
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    for split in SPLITS:
        part = slice(split) if rank == 0 else slice(split, None)
        torch.save(everything(make_batch(part)), folder / f"{split}_{rank}.pt")
    assert averaged(rank) == {
        "rollout/infra_errors": 3.0,
        "rollout/mixed_groups": 1.0,
        "train/return": 5.0,
    }
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
