"""Modulations: a coefficient a response that rescales its base advantage."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from aem_lightning.collectives import apart, over_ranks, summed, whole_columns
from aem_lightning.functional import aem_coefficients, empg_bonus, empg_gain, response_entropy
from aem_lightning.functional.segments import segment_ids, segment_range
from aem_lightning.types import RolloutBatch, Seed


@dataclass(frozen=True)
class Modulated:
    """What a modulation makes of a batch.

    Attributes:
        alpha: The coefficient of each response, [R].
        gated: Share of groups that the gate left at 1.
        change: From base advantages [R] to those of the loss, where that is not ``alpha * A``.
    """

    alpha: Tensor
    gated: float
    change: Callable[[Tensor], Tensor] | None = None

    def apply(self, advantages: Tensor, batch: RolloutBatch) -> Tensor:
        """The advantages of the loss: [R], or [S, L] for those of tokens; 0 outside the loss.

        Raises:
            ValueError: A modulation that is more than a factor meets advantages of tokens.
        """
        of_tokens = advantages.ndim == 2
        if of_tokens and self.change is not None:
            raise ValueError(
                "This modulation adds to the advantage of a response, and PPO has one a token: "
                "type modulation=aem or modulation=none"
            )
        index = batch.response_index.clamp(min=0) if of_tokens else slice(None)
        factor = self.alpha[index]
        changed = factor * advantages if self.change is None else self.change(advantages)
        return torch.where(batch.response_mask[index], changed, torch.zeros_like(changed))


class Modulation(Protocol):
    """Anything that gives a coefficient for each response of a batch."""

    @property
    def keeps_zeros(self) -> bool:
        """Whether an advantage of 0 stays 0, so that its response needs no pass of the update."""
        ...

    def __call__(self, batch: RolloutBatch) -> Modulated: ...


@dataclass(frozen=True)
class NoModulation:
    """The base estimator as it is: every coefficient is 1."""

    keeps_zeros: ClassVar[bool] = True

    def __call__(self, batch: RolloutBatch) -> Modulated:
        return Modulated(torch.ones_like(batch.entropy), 1.0)


@dataclass(frozen=True)
class AEM:
    """Adaptive Entropy Modulation: alpha = exp(-sharpness * H~) over its group mean.

    H~ is the response's mean token entropy, min-max normalised within its group; the mean is over
    unique responses. A group whose range is under ``min_range`` nats is left alone. Source: arXiv
    2605.00425; the first of each choice is the paper's, the others are its ablations.

    Attributes:
        sharpness: The paper's lambda.
        min_range: The gate, in nats.
        direction: ``paper``, ``reversed`` (the exponent's sign flipped), ``shuffled`` (alpha
            permuted within its group).
        scope: What a group is: the responses to one ``task``, of one ``trajectory``, of the whole
            ``batch`` (all ranks), or to one observation of a task (``anchor_state``).
        tokens: Whose entropies H-bar averages: ``all`` tokens of a response, or its ``action``'s.
        mean: alpha averages 1 over the group's responses, or over its tokens.
        seed: Of the shuffle, which depends on it and on the batch alone.
    """

    keeps_zeros: ClassVar[bool] = True

    sharpness: float = 1.0
    min_range: float = 0.1
    direction: Literal["paper", "reversed", "shuffled"] = "paper"
    scope: Literal["task", "trajectory", "batch", "anchor_state"] = "task"
    tokens: Literal["all", "action"] = "all"
    mean: Literal["response", "token"] = "response"
    seed: Seed = 0

    def __post_init__(self) -> None:
        if not self.min_range >= 0:
            raise ValueError(
                f"modulation.min_range={self.min_range} is not a number of nats >= 0, e.g. 0.1."
            )
        if not math.isfinite(self.sharpness):
            raise ValueError(
                f"modulation.sharpness={self.sharpness} is not a finite number; the paper's is 1."
            )
        for name, kind in get_type_hints(type(self)).items():
            allowed = get_args(kind) if get_origin(kind) is Literal else None
            if allowed and getattr(self, name) not in allowed:
                raise ValueError(
                    f"modulation.{name}={getattr(self, name)!r} is unknown; allowed: "
                    f"{', '.join(allowed)}."
                )

    def __call__(self, batch: RolloutBatch) -> Modulated:
        mask = batch.response_mask & (batch.length > 0)
        drawn = self.direction == "shuffled"  # for all ranks together
        groups = self.groups(batch)
        mine: Tensor | slice = slice(None)
        if drawn and self.scope in ("trajectory", "anchor_state"):
            groups = apart(groups)
        columns: Sequence[Tensor] = [self.entropy(batch), groups, mask, batch.length]
        if drawn or self.scope == "batch":
            columns, mine = whole_columns(columns, batch.response_group)
        entropy, group, mask, length = columns
        alpha = aem_coefficients(
            entropy,
            group,
            sharpness=self.sharpness,
            min_range=self.min_range,
            direction=self.direction,
            mask=mask,
            weight=length if self.mean == "token" else None,
            generator=self.generator(batch) if self.direction == "shuffled" else None,
        )
        return Modulated(alpha[mine], _gated_share(entropy[mask], group[mask], self.min_range))

    def groups(self, batch: RolloutBatch) -> Tensor:
        """The group of each response under this scope, [R]."""
        groups = {
            "task": batch.response_group,
            "trajectory": batch.trajectory,
            "anchor_state": batch.anchor,
            "batch": torch.zeros_like(batch.trajectory),
        }
        return groups[self.scope]

    def entropy(self, batch: RolloutBatch) -> Tensor:
        """H-bar of each response over the tokens that count, [R]."""
        if self.tokens == "all":
            return batch.entropy
        if batch.action_mask is None:
            raise ValueError(
                "modulation.tokens=action needs to know the tokens of the actions, and this batch "
                "has no action_mask. Type modulation.tokens=all."
            )
        index = torch.where(batch.action_mask, batch.response_index, -1)
        return response_entropy(batch.entropies, index, batch.num_responses)

    def generator(self, batch: RolloutBatch) -> torch.Generator:
        """The shuffle's randomness: the same for the same batch of all ranks, so runs can go on."""
        # The mask keeps the sum within what a generator takes as a seed.
        total, _ = over_ranks(batch.input_ids.sum().reshape(1))
        return torch.Generator().manual_seed((self.seed + int(total.sum())) & (2**62 - 1))


@dataclass(frozen=True)
class EMPG:
    """Entropy-modulated policy gradients: a gain for certain steps, and a bonus for clear futures.

    ``A' = g * A + zeta * f``, then centred over the batch of all ranks; g is ``empg_gain``, f is
    ``empg_bonus`` and 0 where no response follows. Both scale entropies over the rollout batch.
    Source: arXiv 2509.09265.
    """

    keeps_zeros: ClassVar[bool] = False

    k: float = 1.0
    k_future: float = 1.0
    zeta: float = 0.05

    def __call__(self, batch: RolloutBatch) -> Modulated:
        counted, mine = over_ranks(batch.response_mask & (batch.length > 0))
        entropy, _ = over_ranks(batch.entropy)
        gain = empg_gain(entropy, k=self.k, mask=counted)[mine]
        owner, _ = over_ranks(batch.trajectory)
        turn, _ = over_ranks(batch.turn)
        # Trajectories are numbered on each rank anew; a first turn begins another one everywhere.
        owner = (turn == 0).cumsum(0) if mine != slice(None) else owner
        bonus = empg_bonus(entropy, owner, turn, k=self.k_future, mask=counted)[mine]

        def change(advantages: Tensor) -> Tensor:
            inside = counted[mine]
            changed = torch.where(inside, gain * advantages + self.zeta * bonus, 0.0)
            everything, _ = over_ranks(changed)
            mean = everything.sum() / counted.sum().clamp(min=1)
            return torch.where(inside, changed - mean, 0.0)

        return Modulated(gain, 0.0, change)


@dataclass(frozen=True)
class Stacked:
    """One modulation after another, e.g. AEM on the advantages that EMPG leaves.

    The coefficients multiply; the gate is the second one's.
    """

    first: Modulation
    then: Modulation

    @property
    def keeps_zeros(self) -> bool:
        return self.first.keeps_zeros and self.then.keeps_zeros

    def __call__(self, batch: RolloutBatch) -> Modulated:
        first, then = self.first(batch), self.then(batch)

        def change(advantages: Tensor) -> Tensor:
            return then.apply(first.apply(advantages, batch), batch)

        return Modulated(first.alpha * then.alpha, then.gated, change)


def _gated_share(entropy: Tensor, group: Tensor, min_range: float) -> float:
    """Share of the groups whose entropy range is under the gate, over those of every rank."""
    low, high = segment_range(entropy, *segment_ids(group))
    gated = high - low < min_range
    under, groups = summed(low.new_tensor([gated.sum(), len(gated)]))
    return float(under / groups) if groups else 1.0
