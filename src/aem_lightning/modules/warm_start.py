"""The warm start: supervised learning on expert play, for a policy that cannot play yet."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from aem_lightning.modules.policy import Policy
from aem_lightning.rollout import micro_batches
from aem_lightning.types import Trajectory

# What a token of a demonstration is; the loss leaves slips out altogether.
PROMPT, RESPONSE, SLIP = 0, 1, 2


class Demonstrations(Dataset[dict[str, list[int]]]):
    """Rows by number, columns by name; lists of some megabytes, which want no library."""

    def __init__(self, columns: Mapping[str, list[list[int]]]) -> None:
        self._columns = columns

    def __len__(self) -> int:
        return len(self._columns["input_ids"])

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self._columns[key]
        return {name: values[key] for name, values in self._columns.items()}


def demonstrations_dataset(
    trajectories: Sequence[Trajectory], slips: Collection[tuple[str, int]] = ()
) -> Demonstrations:
    """The rows of expert trajectories, as columns ``input_ids`` and ``kind``.

    Args:
        trajectories: Expert episodes.
        slips: The turns, as (key, turn), whose response was not the expert's choice.
    """
    columns: dict[str, list[list[int]]] = {"input_ids": [], "kind": []}
    for trajectory in trajectories:
        kinds = [[PROMPT] * len(row) for row in trajectory.rows]
        for t, turn in enumerate(trajectory.turns):
            kind = SLIP if (trajectory.key, t) in slips else RESPONSE
            kinds[turn.row][turn.start : turn.start + turn.length] = [kind] * turn.length
        # Under memory=window a slip has a row of its own, with nothing in it to learn.
        kept = [i for i, kind in enumerate(kinds) if RESPONSE in kind]
        columns["input_ids"] += [trajectory.rows[i] for i in kept]
        columns["kind"] += [kinds[i] for i in kept]
    return Demonstrations(columns)


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
    """``input_ids`` and the bool masks ``prompt`` and ``response``, [B, L], padded on the right.

    The first token, which nothing predicts, is in neither mask, and nor is a slip.
    """
    width = max(len(row["input_ids"]) for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    kind = torch.full((len(rows), width), SLIP)
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        input_ids[i, :length] = torch.tensor(row["input_ids"])
        kind[i, 1:length] = torch.tensor(row["kind"][1:])
    return {"input_ids": input_ids, "prompt": kind == PROMPT, "response": kind == RESPONSE}


class WarmStartModule(L.LightningModule):
    """Maximises the log-probability of expert responses and, weighted down, of their prompts.

    A hub model needs the responses alone. A model from nothing learns to read from the prompts:
    predicting what the environment says next is what first teaches it to copy names.

    Args:
        policy: The policy; every parameter that requires a gradient is trained.
        lr: Peak learning rate of AdamW.
        total_steps: Optimizer steps of the whole stage, for the one-cycle schedule.
        prompt_weight: Weight of a prompt token; a response token has 1.
    """

    def __init__(
        self, policy: Policy, lr: float, total_steps: int, prompt_weight: float = 0.0
    ) -> None:
        super().__init__()
        self.policy = policy
        self.lr = lr
        self.total_steps = total_steps
        self.prompt_weight = prompt_weight

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        scored = batch["response"]
        if self.prompt_weight:
            scored = scored | batch["prompt"]
        logprobs, _ = self.policy.score(batch["input_ids"], scored)
        is_response = batch["response"][scored]
        weight = torch.where(is_response, 1.0, self.prompt_weight)
        loss = -(weight * logprobs).sum() / weight.sum()
        if not torch.isfinite(loss):
            raise ValueError(
                f"The loss of the warm start is {float(loss.detach())} in batch {batch_idx} of "
                f"epoch {self.current_epoch}; its model is not kept. Type a lower "
                f"policy.warm_start.lr=... than {self.lr}."
            )
        response_loss = -logprobs.detach()[is_response].mean()
        self.log("warm_start/loss", response_loss, prog_bar=True, batch_size=len(scored))
        return loss

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        # The second beta is that of pre-training; with torch's 0.999 some warm starts of the
        # quickstart had not learnt to take a thing before they move it.
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, betas=(0.9, 0.95), weight_decay=0.01)
        steps = max(2, self.total_steps)
        rise = 0.11 if steps == 10 else 0.1  # a rise that ends at step 0 is divided by
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.lr, total_steps=steps, pct_start=rise
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
