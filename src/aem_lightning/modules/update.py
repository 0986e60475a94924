"""What an update computes: its optimizer steps, and the rows that each of them needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from aem_lightning.algorithms import Loss, Modulation
from aem_lightning.collectives import places_of_rows, summed
from aem_lightning.modules.scoring import Objective
from aem_lightning.modules.settings import UpdateSettings
from aem_lightning.rollout import minibatches
from aem_lightning.rollout.shortage import in_stage
from aem_lightning.types import RolloutBatch


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        rows: Its minibatch: the rows whose response tokens the loss is divided by.
        active: Those of them that the loss has a gradient for; the others are never computed.
    """

    rows: list[int]
    active: list[int]


@dataclass(frozen=True)
class UpdatePlan:
    """The optimizer steps of an iteration.

    Attributes:
        steps: Those of every update epoch, in order.
        epoch_steps: Steps of one update epoch, which together hold every row once.
        idle: Rows that no step computes.
        skipped: Why there is nothing to do, on any rank; ``None`` when there is.
    """

    steps: list[Step]
    epoch_steps: int
    idle: list[int]
    skipped: str | None = None

    @classmethod
    def draw(
        cls,
        active: Tensor,
        settings: UpdateSettings,
        generator: torch.Generator,
        skipped: str | None = None,
        groups: Tensor | None = None,
    ) -> UpdatePlan:
        """A random plan for S rows; ``active`` [S] bool says which have a gradient.

        Minibatches are drawn from all rows, so what is active changes no row's step; and from those
        of all ranks in the order of their ``groups`` [S], so neither does the number of ranks.
        Without groups there are no other ranks.
        """
        is_active = active.tolist()
        places, count = places_of_rows(torch.zeros_like(active) if groups is None else groups)
        row_at = {place: row for row, place in enumerate(places.tolist())}
        drawn = [
            [row_at[at] for at in part if at in row_at]
            for _ in range(settings.update_epochs)
            for part in minibatches(count, settings.num_minibatches, generator)
        ]
        steps = [Step(rows, [row for row in rows if is_active[row]]) for rows in drawn]
        idle = [row for row, needed in enumerate(is_active) if not needed]
        return cls(steps, settings.num_minibatches, idle, skipped)

    @property
    def is_on_policy(self) -> bool:
        """The rollout batch was sampled with the weights of the only step."""
        return len(self.steps) == 1

    @property
    def passes(self) -> int:
        """Rows that all steps together compute."""
        return 0 if self.skipped else sum(len(step.active) for step in self.steps)

    @property
    def first_epoch(self) -> list[list[int]]:
        """The active rows of each step of the first update epoch."""
        return [step.active for step in self.steps[: self.epoch_steps]]


def rows_with_gradient(
    batch: RolloutBatch, advantages: Tensor, loss: Loss, *, zeros_count: bool
) -> Tensor:
    """Rows whose response tokens move the weights, [S] bool.

    A response of advantage 0 does so through a KL term, what else the loss has for it, or what
    ``zeros_count`` stands for. One that is masked out of the loss never does.

    Args:
        batch: The rollout batch.
        advantages: Of each response, [R], or of each token, [S, L].
        loss: Says what it has for a response of advantage 0.
        zeros_count: Something else gives responses of advantage 0 a gradient: a value loss, a
            modulation that adds to advantages, or covariance control, which may choose its tokens.
    """
    inside = (batch.response_index >= 0) & batch.response_mask[batch.response_index.clamp(min=0)]
    if loss.keeps_zeros and not (loss.needs_reference or zeros_count):
        of_tokens = advantages.ndim == 2
        spread = advantages if of_tokens else advantages[batch.response_index.clamp(min=0)]
        inside = inside & (spread != 0)
    return inside.any(dim=1)


def accumulate_gradients(
    objective: Objective,
    micro: Iterable[Sequence[int]],
    units: Tensor,
    check: Callable[[str, Tensor], None],
) -> dict[str, Tensor]:
    """Leave the gradients of some micro-batches in the parameters; returns sums for the log.

    Args:
        objective: The loss, summed over tokens.
        micro: Rows of each micro-batch.
        units: What the loss is divided by.
        check: Raises where a named value is not finite.
    """
    objective.policy.zero_grad()  # here: when memory runs out, this starts again
    sums: dict[str, Tensor] = {}
    for rows in micro:
        terms = objective(rows)
        check("loss", terms.loss)
        (terms.loss / units).backward()
        for name, value in terms.stats.items():
            sums[name] = sums[name] + value if name in sums else value
    return sums


def means_of_steps(
    sums: dict[str, Tensor], plan: UpdatePlan, global_sum: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """Sums over steps as means, and the share of rows left out, ``dropped_rows``; of all ranks."""
    rows = sum(len(step.rows) for step in plan.steps)
    dropped = rows - sum(len(step.active) for step in plan.steps)
    totals = torch.stack([*sums.values()]).float()
    totals = global_sum(torch.cat([totals, totals.new_tensor([dropped, rows])]))
    *values, dropped, rows = totals.tolist()
    means = {name: value / len(plan.steps) for name, value in zip(sums, values, strict=True)}
    return means | {"dropped_rows": dropped / rows}


def sum_gradients(parameters: Iterable[torch.nn.Parameter], world_size: int) -> None:
    """Sum gradients over ranks, once and flat; a parameter without one gets zeros.

    Zeros, because a step without active rows is a step all the same: momentum and weight decay move
    the weights as they would have, had its rows been computed.
    """
    parameters = list(parameters)
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if world_size > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = summed(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        pieces = flat.split([gradient.numel() for gradient in gradients])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)


def clip_globally(
    parameters: Iterable[torch.nn.Parameter], max_norm: float, world_size: int
) -> Tensor:
    """Sum the gradients over ranks, then clip; the norm before clipping."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    sum_gradients(trained, world_size)
    return torch.nn.utils.clip_grad_norm_(trained, max_norm)


def take_step(optimizer: LightningOptimizer) -> None:
    """Change the weights; the first step makes the optimizer's states."""
    with in_stage("optimizer step", "a smaller policy.lora.r=..., or a smaller policy=..."):
        optimizer.step()


def reason_to_skip(
    spread: float, episodes: float, modulation: Modulation, loss: Loss
) -> str | None:
    """Why there is nothing to learn from a batch; ``None`` when there is.

    Args:
        spread: The sum of absolute advantages, over all ranks.
        episodes: How many of theirs can be judged.
        modulation: Whether it moves advantages of 0.
        loss: Whether it has a gradient for them.
    """
    if not episodes:
        return "every episode broke"
    if spread == 0 and modulation.keeps_zeros and loss.keeps_zeros:
        return "every group is uniform: all copies of each task earned the same return"
    return None
