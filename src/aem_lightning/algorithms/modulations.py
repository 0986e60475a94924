"""Modulations: a coefficient a response that rescales its base advantage."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from aem_lightning.collectives import apart, over_ranks, summed, whole_columns
from aem_lightning.functional import (
    aem_coefficients,
    empg_bonus,
    empg_gain,
    repo_advantages,
    response_entropy,
)
from aem_lightning.functional.segments import (
    prompt_ids,
    segment_ids,
    segment_mean,
    segment_range,
)
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
        proxy: What stands for the entropy of a response. ``mean_entropy`` is the paper's H-bar;
            ``entropy_sum`` is the sum of its token entropies; ``relative_surprisal`` is its
            surprisal minus the mean entropy sum of the group's responses to the very same prompt,
            whose expectation is 0 in every state. ``min_range`` is in nats of the proxy.
        seed: Of the shuffle, which depends on it and on the batch alone.
    """

    keeps_zeros: ClassVar[bool] = True

    sharpness: float = 1.0
    min_range: float = 0.1
    direction: Literal["paper", "reversed", "shuffled"] = "paper"
    scope: Literal["task", "trajectory", "batch", "anchor_state"] = "task"
    tokens: Literal["all", "action"] = "all"
    mean: Literal["response", "token"] = "response"
    proxy: Literal["mean_entropy", "entropy_sum", "relative_surprisal"] = "mean_entropy"
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
        if self.tokens == "action" and self.proxy != "mean_entropy":
            raise ValueError(
                f"modulation.proxy={self.proxy} is of whole responses: type modulation.tokens=all, "
                "or modulation.proxy=mean_entropy."
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
        """The proxy of each response's entropy, [R]."""
        if self.tokens == "all":
            return entropy_proxy(batch, self.proxy)
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


def entropy_proxy(batch: RolloutBatch, name: str) -> Tensor:
    """The proxy of that name of each response's entropy, [R]; see `AEM`."""
    if name == "mean_entropy":
        return batch.entropy
    total = batch.entropy * batch.length
    if name == "entropy_sum":
        return total
    prompts = prompt_ids(batch.input_ids, batch.response_index, batch.num_responses)
    ids, count = segment_ids(batch.response_group, prompts)
    return batch.surprisal - segment_mean(total, ids, count)[ids]


@dataclass(frozen=True)
class RepoR:
    """REPO-R: advantages of tokens that hold the policy's entropy near its first iteration's.

    With pi the current probability of a token, detached: ``max(0, A (1 - zeta log pi))`` where
    A > 0 and ``min(0, A (1 + zeta log pi))`` where A < 0, so that a positive zeta favours rare
    tokens. Once an iteration zeta moves by a factor of 2: up while the entropy is under the target,
    down while it is over; on its way through 0 its sign flips at ``zeta_min``. Source: arXiv
    2603.11682.

    Attributes:
        zeta: At the start; its present value is a part of checkpoints.
        zeta_min: The least size of zeta, at which its sign flips.
        zeta_max: The largest size.
        target: Nats a token; ``None`` takes the entropy of the first iteration.
    """

    keeps_zeros: ClassVar[bool] = True

    zeta: float = 0.01
    zeta_min: float = 1e-3
    zeta_max: float = 1.0
    target: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.zeta_min <= abs(self.zeta) <= self.zeta_max:
            raise ValueError(
                f"modulation.zeta={self.zeta} zeta_min={self.zeta_min} zeta_max={self.zeta_max}: "
                "type 0 < zeta_min <= |zeta| <= zeta_max"
            )

    def __call__(self, batch: RolloutBatch) -> Modulated:
        return Modulated(torch.ones_like(batch.entropy), 1.0)

    def of_tokens(self, advantages: Tensor, logprobs: Tensor) -> Tensor:
        """The advantages of T tokens under their present log-probabilities, [T] each."""
        return repo_advantages(advantages, logprobs, self.zeta)

    def adapted(self, entropy: float) -> RepoR:
        """The modulation of the next iteration, after one of this mean token entropy."""
        target = entropy if self.target is None else self.target
        if entropy == target:
            return replace(self, target=target)
        upwards = entropy < target
        size = abs(self.zeta) * (2.0 if upwards == (self.zeta > 0) else 0.5)
        sign = math.copysign(1.0, self.zeta)
        if size < self.zeta_min:
            size, sign = self.zeta_min, -sign
        return replace(self, zeta=sign * min(size, self.zeta_max), target=target)


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

    def __post_init__(self) -> None:
        if any(hasattr(part, "of_tokens") for part in (self.first, self.then)):
            raise ValueError("modulation: RepoR works on tokens, and stacks with nothing else")

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
