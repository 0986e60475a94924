"""Success, return and validity of episodes, as curves and as a summary with intervals."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from functools import partial
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from aem_lightning.types import MALFORMED, Task, Trajectory, malformed_kinds

OTHER = "other"
_Z = NormalDist().inv_cdf(0.975)

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
    ``malformed_rate/{kind}``    the same by reason (`MALFORMED`), where it occurred
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
    malformed: Tensor  # [kinds]
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
        for name in ("turns", "valid", "infra_errors"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")
        none = torch.zeros(len(MALFORMED), dtype=torch.long)
        self.add_state("malformed", none, dist_reduce_fx="sum")

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
            for kind, count in malformed_kinds(trajectory.turns).items():
                self.malformed[MALFORMED.index(kind)] += count
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
            malformed = self.malformed.sum()
            values["malformed_rate"] = malformed / self.turns
            for kind, count in zip(MALFORMED, self.malformed, strict=True):
                if count > 0:
                    values[f"malformed_rate/{kind.replace(' ', '_')}"] = count / self.turns
            inadmissible = self.turns - self.valid - malformed
            values["inadmissible_rate"] = inadmissible / self.turns
        return values

    def _bucket(self, task_type: str) -> int:
        name = task_type if task_type in self.task_types else OTHER
        return self.task_types.index(name)


def wilson_interval(successes: float, trials: float) -> tuple[float, float]:
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
    z = _Z
    rate = successes / trials
    scale = 1 + z * z / trials
    centre = (rate + z * z / (2 * trials)) / scale
    half = z * math.sqrt(rate * (1 - rate) / trials + (z / (2 * trials)) ** 2) / scale
    # Rounding would put a bound of 0 or 1 a few ulps beside it.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return low, high


def interval_over_games(shares: Sequence[float], tries: int) -> tuple[float, float]:
    r"""95 % interval of the mean of the games' win shares, where games were played repeatedly.

    Tries at one game are alike, so they are worth fewer trials than there are: Wilson's interval of

    .. math:: n = \frac{\bar p (1 - \bar p)}{s^2 / G} \Big(\frac{z}{t_{G-1}}\Big)^2

    trials, s² the variance between the G games. At least G, which it is where all tries at a game
    end alike (then it is Wilson's interval over games) or all are won or lost; at most ``tries``.
    Source: E. L. Korn, B. I. Graubard, "Confidence intervals for proportions with small expected
    number of positive counts estimated from survey data", 1998, here around Wilson's interval.

    Args:
        shares: Of each game, the share of its tries that won.
        tries: The tries at all games together.

    Raises:
        ValueError: There is no game.

    Example:
        >>> interval_over_games([1, 0, 0, 1], tries=8) == wilson_interval(2, 4)
        True
        >>> low, high = interval_over_games([0.5, 0.25, 0.75, 0.5] * 10, tries=160)
        >>> round(low, 4), round(high, 4)
        (0.4234, 0.5766)
    """
    games = len(shares)
    mean = math.fsum(shares) / max(games, 1)
    spread = math.fsum((share - mean) ** 2 for share in shares)
    trials = float(games)
    if games > 1 and 0 < mean < 1:
        worth = games * (games - 1) * mean * (1 - mean) / spread if spread else math.inf
        trials = min(max(worth * (_Z / _t_quantile(games - 1)) ** 2, games), tries)
    return wilson_interval(mean * trials, trials)


def _t_quantile(freedom: int) -> float:
    """About the 97.5 % quantile of Student's t: Abramowitz and Stegun, 26.7.5."""
    z = _Z
    first = (z**3 + z) / 4 / freedom
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96 / freedom**2
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384 / freedom**3
    return z + first + second + third


def pass_at_k(wins: int, tries: int, k: int) -> float:
    r"""Chance that at least one of ``k`` tries at a game wins, where ``wins`` of ``tries`` did.

    .. math:: 1 - \binom{n - c}{k} \Big/ \binom{n}{k}

    Unbiased. Source: M. Chen et al., "Evaluating large language models trained on code", arXiv
    2107.03374, 2021.

    Raises:
        ValueError: Not 1 <= k <= tries, or the wins are not within the tries.

    Example:
        >>> pass_at_k(1, 4, 1), pass_at_k(1, 4, 2), pass_at_k(1, 4, 4)
        (0.25, 0.5, 1.0)
    """
    _check_tries(wins, tries, k)
    return 1 - math.comb(tries - wins, k) / math.comb(tries, k)


def pass_hat_k(wins: int, tries: int, k: int) -> float:
    r"""pass^k, the chance that all of ``k`` tries at a game win, where ``wins`` of ``tries`` did.

    .. math:: \binom{c}{k} \Big/ \binom{n}{k}

    Unbiased. Source: S. Yao et al., "tau-bench", arXiv 2406.12045, 2024.

    Raises:
        ValueError: As `pass_at_k`.

    Example:
        >>> pass_hat_k(3, 4, 1), pass_hat_k(3, 4, 2), pass_hat_k(3, 4, 4)
        (0.75, 0.5, 0.0)
    """
    _check_tries(wins, tries, k)
    return math.comb(wins, k) / math.comb(tries, k)


def _check_tries(wins: int, tries: int, k: int) -> None:
    if not (1 <= k <= tries and 0 <= wins <= tries):
        raise ValueError(
            f"{wins} wins of {tries} tries, k={k}: k must be 1 to the number of tries, and so "
            "many tries can have been won"
        )


class NothingToJudgeError(ValueError):
    """There is no episode that says anything about the policy."""


def success_summary(trajectories: Iterable[Trajectory], repeats: int = 1) -> dict[str, Any]:
    """Success rate with its interval over games, overall and by task type, as plain data for JSON.

    Args:
        trajectories: The episodes. Those with an ``infra_error`` count in ``infra_errors`` alone.
        repeats: How often each task was played. With more than 1 the rate is the mean over games,
            and each has ``games``, ``pass_at_k`` and ``pass_hat_k`` too, by k = 1, 2, 4, ... and
            ``repeats``; games of which fewer than k tries are judged are left out of those.

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
    rate = _rate if repeats == 1 else partial(_rate_over_games, repeats=repeats)
    return {
        **rate(judged),
        "score": sum(trajectory.score for trajectory in judged) / len(judged),
        "infra_errors": broken,
        "by_type": {name: rate(by_type[name]) for name in sorted(by_type)},
    }


def _rate(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    wins, episodes = sum(bool(t.won) for t in trajectories), len(trajectories)
    low, high = wilson_interval(wins, episodes)
    return {"rate": wins / episodes, "low": low, "high": high, "episodes": episodes}


def _rate_over_games(trajectories: Sequence[Trajectory], repeats: int) -> dict[str, Any]:
    by_game: dict[Task, list[bool]] = {}
    for trajectory in trajectories:
        by_game.setdefault(trajectory.task, []).append(bool(trajectory.won))
    games = [(sum(won), len(won)) for won in by_game.values()]
    shares = [wins / tries for wins, tries in games]
    low, high = interval_over_games(shares, len(trajectories))
    steps = sorted({repeats, *(2**i for i in range(repeats.bit_length()) if 2**i <= repeats)})
    found: dict[str, Any] = {
        "rate": math.fsum(shares) / len(shares),
        "low": low,
        "high": high,
        "episodes": len(trajectories),
        "games": len(games),
    }
    for name, estimate in (("pass_at_k", pass_at_k), ("pass_hat_k", pass_hat_k)):
        values = {k: [estimate(*game, k) for game in games if game[1] >= k] for k in steps}
        found[name] = {str(k): math.fsum(v) / len(v) for k, v in values.items() if v}
    return found
