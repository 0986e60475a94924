"""Success, return and validity of episodes, as curves and as a summary with intervals."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from aem_lightning.types import Trajectory

OTHER = "other"

log = logging.getLogger(__name__)


class EpisodeMetrics(Metric):
    """Rates over episodes, exact over batches and ranks: the states are sums.

    Episodes with an ``infra_error`` say nothing about the policy: they count in ``infra_errors``
    and nowhere else.

    ============================ ===================================================================
    name                         meaning
    ============================ ===================================================================
    ``success_rate``             share of episodes that the environment calls won
    ``success_rate/{type}``      the same by task type; a type without episodes is left out
    ``score``                    mean graded result, before any shaping of rewards
    ``return``                   mean undiscounted sum of rewards
    ``turns``                    mean number of turns
    ``valid_action_rate``        share of turns whose action was admissible
    ``malformed_rate``           share of turns without an action in the response
    ``inadmissible_rate``        share of turns with an action that was not admissible
    ``episodes``                 their number
    ``infra_errors``             episodes that something outside the policy broke
    ============================ ===================================================================

    The three rates of turns add up to 1. Without episodes the means are left out, and where all
    broke a warning says why.

    Args:
        task_types: Types to break success down by. Every other type counts as ``other``.

    Raises:
        ValueError: A type is named twice.

    Example:
        >>> from aem_lightning.types import Task
        >>> metric = EpisodeMetrics(["pick"])
        >>> won = Trajectory(Task("a", "pick"), group=0, copy=0, won=True)
        >>> metric.update([won, Trajectory(Task("b"), group=1, copy=0)])
        >>> values = metric.compute()
        >>> values["success_rate"].item(), values["success_rate/pick"].item()
        (0.5, 1.0)
    """

    full_state_update = False
    higher_is_better = True
    wins: Tensor  # [types + 1]
    episodes: Tensor  # [types + 1]
    returns: Tensor
    scores: Tensor
    turns: Tensor
    valid: Tensor
    malformed: Tensor
    infra_errors: Tensor

    def __init__(self, task_types: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if len(set(task_types)) != len(task_types):
            raise ValueError(f"EpisodeMetrics: a task type is named twice in {list(task_types)}.")
        self.task_types = [name for name in task_types if name != OTHER] + [OTHER]
        types = len(self.task_types)
        self._last_error = ""
        self.add_state("wins", torch.zeros(types, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("episodes", torch.zeros(types, dtype=torch.long), dist_reduce_fx="sum")
        for name in ("returns", "scores"):
            self.add_state(name, torch.tensor(0.0), dist_reduce_fx="sum")
        for name in ("turns", "valid", "malformed", "infra_errors"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, trajectories: Sequence[Trajectory]) -> None:
        """Add episodes."""
        for trajectory in trajectories:
            if trajectory.infra_error:
                self.infra_errors += 1
                self._last_error = trajectory.infra_error
                continue
            bucket = self._bucket(trajectory.task.type)
            self.episodes[bucket] += 1
            self.wins[bucket] += int(trajectory.won)
            self.returns += trajectory.total_reward
            self.scores += trajectory.score
            self.turns += len(trajectory.turns)
            malformed = sum(turn.action is None for turn in trajectory.turns)
            self.malformed += malformed
            self.valid += sum(
                turn.is_valid and turn.action is not None for turn in trajectory.turns
            )

    def compute(self) -> dict[str, Tensor]:
        """The rates so far, by name."""
        episodes = self.episodes.sum()
        values = {"episodes": episodes.float(), "infra_errors": self.infra_errors.float()}
        if self.infra_errors > 0 and not episodes:
            text = "There is nothing to judge: all %d episodes broke, the last: %s"
            log.warning(text, self.infra_errors, self._last_error or "on another rank")
        if episodes > 0:
            values["success_rate"] = self.wins.sum() / episodes
            values["score"] = self.scores / episodes
            values["return"] = self.returns / episodes
            values["turns"] = self.turns / episodes
        for name, wins, count in zip(self.task_types, self.wins, self.episodes, strict=True):
            if count > 0:
                values[f"success_rate/{name}"] = wins / count
        if self.turns > 0:
            values["valid_action_rate"] = self.valid / self.turns
            values["malformed_rate"] = self.malformed / self.turns
            inadmissible = self.turns - self.valid - self.malformed
            values["inadmissible_rate"] = inadmissible / self.turns
        return values

    def _bucket(self, task_type: str) -> int:
        name = task_type if task_type in self.task_types else OTHER
        return self.task_types.index(name)


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    r"""Wilson's score interval of a success rate, 95 %.

    .. math:: \frac{\hat p + z^2/2n \pm z \sqrt{\hat p (1 - \hat p)/n + z^2/4n^2}}{1 + z^2/n}

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
    1927.

    Raises:
        ValueError: There are no trials, or the successes are not within them.

    Example:
        >>> low, high = wilson_interval(8, 10)
        >>> round(low, 4), round(high, 4)
        (0.4902, 0.9433)
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(
            f"wilson_interval: {successes} successes of {trials} trials; "
            "there must be 1 trial or more, and 0 to that many successes."
        )
    z = NormalDist().inv_cdf(0.975)
    rate = successes / trials
    scale = 1 + z * z / trials
    centre = (rate + z * z / (2 * trials)) / scale
    half = z * math.sqrt(rate * (1 - rate) / trials + (z / (2 * trials)) ** 2) / scale
    # Rounding would put a bound of 0 or 1 a few ulps beside it.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return low, high


class NothingToJudgeError(ValueError):
    """There is no episode that says anything about the policy."""


def success_summary(trajectories: Iterable[Trajectory]) -> dict[str, Any]:
    """Success rate with its Wilson interval, overall and by task type, as plain data for JSON.

    Args:
        trajectories: The episodes. Those with an ``infra_error`` count in ``infra_errors`` alone.

    Returns:
        ``{rate, low, high, episodes, score, infra_errors, by_type: {type: {rate, low, high,
        episodes}}}``, types sorted; a task without a type stands under ``other``. ``score`` is the
        mean graded result.

    Raises:
        NothingToJudgeError: There is no episode to judge.
    """
    given = list(trajectories)
    judged = [trajectory for trajectory in given if not trajectory.infra_error]
    broken = len(given) - len(judged)
    if not judged:
        why = f" The last broke so: {given[-1].infra_error}" if given else ""
        raise NothingToJudgeError(
            f"success_summary: no episode to judge ({len(given)} given, {broken} broken by the "
            "environment); at least 1 is needed. Check that the split has tasks and that the "
            f"environment starts.{why}"
        )
    by_type: dict[str, list[Trajectory]] = {}
    for trajectory in judged:
        by_type.setdefault(trajectory.task.type or OTHER, []).append(trajectory)
    return {
        **_rate(judged),
        "score": sum(trajectory.score for trajectory in judged) / len(judged),
        "infra_errors": broken,
        "by_type": {name: _rate(by_type[name]) for name in sorted(by_type)},
    }


def _rate(trajectories: Sequence[Trajectory]) -> dict[str, float | int]:
    wins, episodes = sum(bool(t.won) for t in trajectories), len(trajectories)
    low, high = wilson_interval(wins, episodes)
    return {"rate": wins / episodes, "low": low, "high": high, "episodes": episodes}
