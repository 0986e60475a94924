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
    """The rows of expert trajectories, as columns ``input_ids`` and ``response_mask``."""
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
    """``input_ids`` and the masks ``valid`` and ``response`` (bool), all [B, L], padded on the right.

    ``valid`` leaves out the first token, which nothing predicts.
    """
    width = max(len(row["input_ids"]) for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    valid = torch.zeros(len(rows), width, dtype=torch.bool)
    response = torch.zeros_like(valid)
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        input_ids[i, :length] = torch.tensor(row["input_ids"])
        valid[i, 1:length] = True
        response[i, :length] = torch.tensor(row["response_mask"], dtype=torch.bool)
    return {"input_ids": input_ids, "valid": valid, "response": response}


class WarmStartModule(L.LightningModule):
    """Maximises the log-probability of expert responses and, with a smaller weight, of what they answer.

    A hub model needs the responses alone. A model from nothing learns to read from the prompts: predicting what
    the environment says next is what first teaches it to copy names.

    Args:
        policy: The policy; every parameter that requires a gradient is trained.
        lr: Peak learning rate of AdamW.
        total_steps: Optimizer steps of the whole stage, for the one-cycle schedule.
        prompt_weight: Weight of a prompt token; a response token has 1.
        weight_decay: AdamW's.
    """

    def __init__(
        self,
        policy: Policy,
        lr: float,
        total_steps: int,
        prompt_weight: float = 0.0,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.lr = lr
        self.total_steps = total_steps
        self.prompt_weight = prompt_weight
        self.weight_decay = weight_decay

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        scored = batch["valid"] if self.prompt_weight else batch["response"]
        logprobs, _ = self.policy.score(batch["input_ids"], scored)
        is_response = batch["response"][scored]
        weight = torch.where(is_response, 1.0, self.prompt_weight)
        loss = -(weight * logprobs).sum() / weight.sum()
        response_loss = -logprobs.detach()[is_response].mean()
        self.log("warm_start/loss", response_loss, prog_bar=True, batch_size=len(scored))
        return loss

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.lr, total_steps=max(2, self.total_steps), pct_start=0.1
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
