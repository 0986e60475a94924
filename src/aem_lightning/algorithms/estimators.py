"""Base estimators: from a rollout batch to one advantage a response."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from torch import Tensor

from aem_lightning.collectives import over_ranks
from aem_lightning.functional import (
    gigpo_step_advantages,
    graph_rewards,
    grpo_advantages,
    hgpo_advantages,
    maxrl_advantages,
    overlong_penalty,
    qae_advantages,
    rloo_advantages,
    step_returns,
    whiten,
)
from aem_lightning.functional.segments import segment_mean
from aem_lightning.types import Count, NonNegative, RolloutBatch

Statistics = Literal["trajectory", "step"]


class Estimator(Protocol):
    """Anything that gives base advantages, [R]; `PPO` gives one a token, [S, L]."""

    @property
    def min_group_size(self) -> int:
        """The smallest group that it can compare."""
        ...

    def __call__(self, batch: RolloutBatch) -> Tensor: ...


def check_group_size(group_size: int, estimator: Estimator) -> None:
    """Raise unless a group is large enough for ``estimator``.

    Raises:
        ValueError: It is too small; says what to type.
    """
    if group_size < estimator.min_group_size:
        raise ValueError(
            f"group_size={group_size} is too small for {type(estimator).__name__}: it "
            "compares the copies of a task, so a group needs at least "
            f"{estimator.min_group_size}. Type group_size=8."
        )


@dataclass(frozen=True)
class Overlong:
    """DAPO's soft punishment of long responses.

    It grows over the last ``share`` of ``max_length`` tokens, up to ``scale``, the reward that the
    longest response loses. Source: arXiv 2503.14476, equation 13 (a share of 0.2; a scale of 1
    beside a reward of 1).
    """

    max_length: Count
    share: float = 0.2
    scale: NonNegative = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(
                f"advantage.overlong.share={self.share} is not allowed: type a share in (0, 1]"
            )

    def __call__(self, batch: RolloutBatch) -> Tensor:
        """The returns with the punishments of their responses, [N]."""
        cache = max(1, round(self.share * self.max_length))
        penalty = self.scale * overlong_penalty(batch.length, self.max_length, cache)
        return batch.returns.index_add(0, batch.trajectory, penalty.to(batch.returns.dtype))


@dataclass(frozen=True)
class GRPO:
    """Group-relative advantages: (return - group mean) / (group std + eps), for every response.

    ``statistics=trajectory`` counts every trajectory once, so a long failed episode weighs no more
    than a short one; ``step`` counts every response, as verl-agent does. Source: arXiv 2402.03300,
    equation 3. Dr.GRPO (arXiv 2503.20783) is ``normalize_std=False``; DAPO (arXiv 2503.14476) adds
    ``overlong``.
    """

    normalize_std: bool = True
    eps: NonNegative = 1e-6
    statistics: Statistics = "trajectory"
    overlong: Overlong | None = None
    min_group_size: int = 2

    def __post_init__(self) -> None:
        _check_statistics(self.statistics)

    def __call__(self, batch: RolloutBatch) -> Tensor:
        returns = batch.returns if self.overlong is None else self.overlong(batch)  # [N]
        return _of_responses(self.of_groups, returns, batch, self.statistics)

    def of_groups(self, returns: Tensor, group: Tensor, mask: Tensor) -> Tensor:
        """Returns compared within their groups, as long as they are."""
        return grpo_advantages(
            returns, group, normalize_std=self.normalize_std, eps=self.eps, mask=mask
        )


@dataclass(frozen=True)
class RLOO:
    """Leave-one-out advantages: return minus the mean return of the group's other trajectories.

    ``statistics`` as in `GRPO`. Source: arXiv 2402.14740. GRPO++ (DeepSWE) uses it too, with a loss
    of its own.
    """

    statistics: Statistics = "trajectory"
    min_group_size: int = 2

    def __post_init__(self) -> None:
        _check_statistics(self.statistics)

    def __call__(self, batch: RolloutBatch) -> Tensor:
        return _of_responses(rloo_advantages, batch.returns, batch, self.statistics)


@dataclass(frozen=True)
class ReinforcePP:
    """REINFORCE++ advantages: returns whitened over the rollout batch of all ranks.

    It compares a trajectory with every other one, so groups may be of one. Source: arXiv
    2501.03262.
    """

    eps: NonNegative = 1e-6
    min_group_size: int = 1

    def __call__(self, batch: RolloutBatch) -> Tensor:
        returns, mine = over_ranks(batch.returns)
        judged, _ = over_ranks(batch.judged)
        return whiten(returns, eps=self.eps, mask=judged)[mine][batch.trajectory]


@dataclass(frozen=True)
class GiGPO:
    """Group-in-group advantages: GRPO's, plus ``step_weight`` times those among anchor states.

    The step part compares discounted returns among the responses of a group to one observation;
    ``anchor_similarity`` of the run's settings says how alike is one. ``statistics`` is that of
    GRPO's part. Source: arXiv 2505.10978, equation 8.
    """

    normalize_std: bool = True
    eps: NonNegative = 1e-6
    step_weight: float = 1.0
    gamma: float = 0.95
    statistics: Statistics = "trajectory"
    min_group_size: int = 2

    def __post_init__(self) -> None:
        _check_statistics(self.statistics)
        _check_discount(self.gamma)

    def __call__(self, batch: RolloutBatch) -> Tensor:
        episode = GRPO(self.normalize_std, self.eps, self.statistics)(batch)
        following = step_returns(batch.reward, batch.trajectory, batch.turn, self.gamma)
        step = gigpo_step_advantages(
            following,
            batch.response_group,
            batch.anchor,
            normalize_std=self.normalize_std,
            eps=self.eps,
            mask=batch.judged[batch.trajectory],
        )
        return episode + self.step_weight * step


@dataclass(frozen=True)
class GraphGPO(GRPO):
    """GRPO's advantages, plus those among the responses to one observation by where they lead.

    What a response is worth is how near to success the observation after it lies in the graph of
    all that the group has seen: `graph_rewards`. Source: arXiv 2605.26684.

    Attributes:
        step_weight: Weight of the step part.
        success: The step reward of what leads to success.
        decay: What each further step costs; the paper has 0.1 in ALFWorld and 0.2 in WebShop.
        normalize_distance: Reward the progress rather than the distance that is left.
    """

    step_weight: float = 1.0
    success: float = 10.0
    decay: float = 0.1
    normalize_distance: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.decay < 1:
            raise ValueError(f"advantage.decay={self.decay} is not allowed: type one in (0, 1)")

    def __call__(self, batch: RolloutBatch) -> Tensor:
        return super().__call__(batch) + self.step_weight * self.step_advantages(batch)

    def step_advantages(self, batch: RolloutBatch) -> Tensor:
        """The step part, [R]; 0 in groups without success, and where an observation met once."""
        if batch.won is None:
            raise ValueError(
                "GraphGPO needs to know which trajectories were won, and this batch has "
                "no column won. Type algorithm=gigpo."
            )
        judged = batch.judged[batch.trajectory]
        rewards = graph_rewards(
            batch.response_group,
            batch.anchor,
            batch.trajectory,
            batch.turn,
            batch.won[batch.trajectory],
            success=self.success,
            decay=self.decay,
            normalize_distance=self.normalize_distance,
            mask=judged,
        )
        return gigpo_step_advantages(
            rewards, batch.response_group, batch.anchor, eps=self.eps, mask=judged
        )


@dataclass(frozen=True)
class HGPO(GRPO):
    """Advantages among responses with equal histories of 1, 2, ... observations: a weighted mean.

    See `hgpo_advantages`. Source: arXiv 2602.22817; the ALFWorld recipe has ``normalize_std=True``,
    WebShop's ``False``.

    Attributes:
        gamma: Discount a turn of the returns that are compared.
        history_length: Earlier observations that a prompt shows, K.
        power: How much a longer shared history counts.
        base_group: Have GRPO's advantage as one more of them, of the weight of an empty history.
    """

    gamma: float = 0.95
    history_length: int = 2
    power: float = 1.0
    base_group: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_discount(self.gamma)
        if self.history_length < 0:
            raise ValueError(
                f"advantage.history_length={self.history_length} is not allowed: type a number >= 0"
            )

    def __call__(self, batch: RolloutBatch) -> Tensor:
        return hgpo_advantages(
            step_returns(batch.reward, batch.trajectory, batch.turn, self.gamma),
            batch.response_group,
            batch.anchor,
            batch.trajectory,
            batch.turn,
            history_length=self.history_length,
            base=super().__call__(batch) if self.base_group else None,
            power=self.power,
            normalize_std=self.normalize_std,
            eps=self.eps,
            mask=batch.judged[batch.trajectory],
        )


@dataclass(frozen=True)
class QAE(GRPO):
    """Returns against the group's ``quantile`` in place of its mean: `qae_advantages`.

    Where a task is seldom solved only successes move the policy, where it mostly is only failures:
    a control for what the balance of signs does. Source: arXiv 2509.22611.
    """

    quantile: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.quantile <= 1:
            raise ValueError(
                f"advantage.quantile={self.quantile} is not allowed: type a share in (0, 1]"
            )

    def of_groups(self, returns: Tensor, group: Tensor, mask: Tensor) -> Tensor:
        return qae_advantages(
            returns,
            group,
            quantile=self.quantile,
            normalize_std=self.normalize_std,
            eps=self.eps,
            mask=mask,
        )


@dataclass(frozen=True)
class MaxRL:
    """Returns against the group's mean, in units of it: `maxrl_advantages`.

    ``statistics`` as in `GRPO`. Source: arXiv 2602.02710.
    """

    statistics: Statistics = "trajectory"
    min_group_size: int = 2

    def __post_init__(self) -> None:
        _check_statistics(self.statistics)

    def __call__(self, batch: RolloutBatch) -> Tensor:
        return _of_responses(maxrl_advantages, batch.returns, batch, self.statistics)


def _check_discount(gamma: float) -> None:
    if not 0 < gamma <= 1:
        raise ValueError(f"advantage.gamma={gamma} is not a discount: type one in (0, 1]")


def _check_statistics(given: str) -> None:
    if given not in get_args(Statistics):
        raise ValueError(
            f"advantage.statistics={given!r} is unknown; allowed: "
            "advantage.statistics=trajectory, advantage.statistics=step"
        )


def _of_responses(
    estimate: Callable[..., Tensor], returns: Tensor, batch: RolloutBatch, statistics: Statistics
) -> Tensor:
    """The estimate within groups, [R], of ``returns``, [N], counted once or once a response."""
    group, mask, spread = batch.group, batch.judged, batch.trajectory
    if statistics == "step":
        return estimate(returns[spread], group[spread], mask=mask[spread])
    return estimate(returns, group, mask=mask)[spread]


def response_means(advantages: Tensor, batch: RolloutBatch) -> Tensor:
    """One advantage a response, [R]: that of the response, or the mean over its tokens."""
    if advantages.ndim == 1:
        return advantages
    inside = batch.response_index >= 0
    return segment_mean(advantages[inside], batch.response_index[inside], batch.num_responses)
