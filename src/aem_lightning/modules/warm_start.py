"""The warm start: supervised learning on expert play, for a policy that cannot play yet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import lightning as L
import torch
from torch import Tensor
from torch.utils.data import Sampler

from aem_lightning.modules.policy import Policy
from aem_lightning.rollout import micro_batches
from aem_lightning.types import Trajectory


def demonstrations_dataset(trajectories: Sequence[Trajectory]) -> datasets.Dataset:
    """Expert trajectories as rows of ``input_ids`` and ``response_mask``, one a turn or one a trajectory."""
    columns: dict[str, list[list[int]]] = {"input_ids": [], "response_mask": []}
    for trajectory in trajectories:
        masks = [[0] * len(row) for row in trajectory.rows]
        for turn in trajectory.turns:
            masks[turn.row][turn.start : turn.start + turn.length] = [1] * turn.length
        columns["input_ids"] += trajectory.rows
        columns["response_mask"] += masks
    return datasets.Dataset.from_dict(columns)


class DemonstrationSampler(Sampler[list[int]]):
    """Batches of rows of like length within a token budget, in a new random order each epoch."""

    def __init__(self, lengths: Sequence[int], batch_tokens: int, seed: int) -> None:
        self._lengths = torch.tensor(lengths)
        self._batch_tokens, self._seed, self._epoch = batch_tokens, seed, 0
        self._batches = micro_batches(range(len(lengths)), self._lengths, batch_tokens)

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        for i in torch.randperm(len(self._batches), generator=generator).tolist():
            yield self._batches[i]


def collate_demonstrations(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """``input_ids`` and ``mask`` (bool), both [B, L], padded on the right."""
    width = max(len(row["input_ids"]) for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        input_ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        mask[i, : len(row["response_mask"])] = torch.tensor(row["response_mask"], dtype=torch.bool)
    return {"input_ids": input_ids, "mask": mask}


class WarmStartModule(L.LightningModule):
    """Maximises the log-probability of expert responses; prompts are not trained on.

    Args:
        policy: The policy; every parameter that requires a gradient is trained.
        lr: Peak learning rate of AdamW.
        total_steps: Optimizer steps of the whole stage, for the one-cycle schedule.
        weight_decay: AdamW's.
    """

    def __init__(
        self, policy: Policy, lr: float, total_steps: int, weight_decay: float = 0.01
    ) -> None:
        super().__init__()
        self.policy = policy
        self.lr = lr
        self.total_steps = total_steps
        self.weight_decay = weight_decay

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logprobs, _ = self.policy.score(batch["input_ids"], batch["mask"])
        loss = -logprobs.mean()
        self.log("warm_start/loss", loss, prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.lr, total_steps=max(2, self.total_steps), pct_start=0.1
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
