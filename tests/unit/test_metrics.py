from __future__ import annotations

from itertools import combinations

import pytest
import torch

from aem_lightning.metrics import (
    EpisodeMetrics,
    NothingToJudgeError,
    interval_over_games,
    pass_at_k,
    pass_hat_k,
    success_summary,
    wilson_interval,
)
from aem_lightning.types import Task, Trajectory, Turn


def turn(action: str | None = "look", is_valid: bool = True, reward: float = 0.0) -> Turn:
    why = "" if action else "unknown tool 'fly'"
    kept = {"reward": reward, "is_valid": is_valid, "malformed": why}
    return Turn("see", ("look",), "r", action, 0, 0, [-1.0], None, **kept)


def episode(task_type: str, won: bool, *turns: Turn, infra_error: str | None = None) -> Trajectory:
    task = Task("t", task_type, "valid_seen")
    return Trajectory(task, 0, 0, turns=list(turns), won=won, infra_error=infra_error)


EPISODES = [
    episode("pick", True, turn(reward=1.0)),
    episode("pick", False, turn(None, is_valid=False), turn("fly", is_valid=False, reward=-0.5)),
    episode("heat", True, turn(), turn(reward=1.0)),
    episode("made_up", False),
    episode("heat", True, turn(), infra_error="worker died"),
]
for graded, score in zip(EPISODES, (1.0, 0.25, 1.0, 0.0, 1.0), strict=True):
    graded.score = score
EXPECTED = {
    "episodes": 4.0,
    "infra_errors": 1.0,
    "success_rate": 0.5,
    "success_rate/pick": 0.5,
    "success_rate/heat": 1.0,
    "success_rate/other": 0.0,
    "score": 2.25 / 4,
    "return": 1.5 / 4,
    "turns": 5 / 4,
    "valid_action_rate": 3 / 5,
    "malformed_rate": 1 / 5,
    "malformed_rate/unknown_tool": 1 / 5,
    "inadmissible_rate": 1 / 5,
}


def values(metric: EpisodeMetrics) -> dict[str, float]:
    return {name: value.item() for name, value in metric.compute().items()}


def test_rates_are_those_counted_by_hand_however_episodes_are_split_over_updates() -> None:
    metric = EpisodeMetrics(["pick", "heat", "cool"])
    for part in (EPISODES[:1], [], EPISODES[1:]):
        metric.update(part)
    assert values(metric) == pytest.approx(EXPECTED)


def test_states_of_two_ranks_add_up_to_those_of_one() -> None:
    other = EpisodeMetrics(["pick", "heat", "cool"])
    other.update(EPISODES[2:])

    def gather(state: torch.Tensor, group: object = None) -> list[torch.Tensor]:
        name = next(name for name, value in metric.metric_state.items() if value is state)
        return [state, other.metric_state[name]]

    metric = EpisodeMetrics(
        ["pick", "heat", "cool"], dist_sync_fn=gather, distributed_available_fn=lambda: True
    )
    metric.update(EPISODES[:2])
    assert values(metric) == pytest.approx(EXPECTED)


def test_a_metric_without_episodes_gives_no_rate() -> None:
    metric = EpisodeMetrics(["pick"])
    metric.update([])
    assert values(metric) == {"episodes": 0.0, "infra_errors": 0.0}


def test_where_every_episode_broke_the_reason_is_told(caplog: pytest.LogCaptureFixture) -> None:
    metric = EpisodeMetrics(["pick"])
    metric.update([episode("pick", False, infra_error="no docker")] * 2)
    assert values(metric) == {"episodes": 0.0, "infra_errors": 2.0}
    assert "all 2 episodes broke, the last: no docker" in caplog.text


def test_a_task_type_named_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="named twice"):
        EpisodeMetrics(["pick", "pick"])


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Newcombe, "Two-sided confidence intervals for the single proportion", 1998, table I
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson_interval_is_the_published_one(
    successes: int, trials: int, low: float, high: float
) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


def tries(game: str, *won: bool, kind: str = "pick") -> list[Trajectory]:
    """Every episode of a game, one for each copy."""
    task = Task(game, kind, "valid_seen")
    return [Trajectory(task, 0, copy, won=each) for copy, each in enumerate(won)]


def test_games_that_were_repeated_count_once_each() -> None:
    played = [
        *tries("a", True, True, True, True),
        *tries("b", True, False, False, False),
        *tries("c", False, False, False, False, kind="heat"),
        *tries("d", True, True, False, False, kind="heat"),
    ]
    summary = success_summary(played, repeats=4)
    assert (summary["rate"], summary["games"], summary["episodes"]) == (7 / 16, 4, 16)
    # By hand: b wins in 3 of the 6 pairs of its tries, d in 5; a wins both in 6 of 6, d in 1.
    assert summary["pass_at_k"] == pytest.approx(
        {"1": 7 / 16, "2": (1 + 3 / 6 + 0 + 5 / 6) / 4, "4": 3 / 4}
    )
    assert summary["pass_hat_k"] == pytest.approx({"1": 7 / 16, "2": (1 + 1 / 6) / 4, "4": 1 / 4})
    assert summary["by_type"]["heat"]["pass_at_k"]["4"] == 0.5
    over_episodes = wilson_interval(7, 16)
    assert summary["low"] < over_episodes[0]
    assert summary["high"] > over_episodes[1]


def test_a_broken_try_is_a_lost_one_or_loses_its_game() -> None:
    played = [*tries("a", True, False, True), *tries("b", False, False, True)]
    played += tries("c", True, True, True)
    for broken in (played[1], *played[6:]):
        broken.infra_error = "worker died"
    summary = success_summary(played, repeats=3)
    assert (summary["games"], summary["episodes"], summary["infra_errors"]) == (2, 5, 4)
    assert summary["rate"] == pytest.approx((1 + 1 / 3) / 2)
    assert summary["pass_at_k"]["2"] == pytest.approx((1 + 2 / 3) / 2)
    assert summary["pass_at_k"]["3"] == 1.0, "of b alone: a has two judged tries"
    assert "3" not in success_summary(played[:3], repeats=3)["pass_at_k"]


def test_tries_that_end_alike_narrow_the_interval() -> None:
    alike = interval_over_games([1.0] * 12 + [0.0] * 8, tries=80)
    assert alike == wilson_interval(12, 20)
    for share in (0.0, 1.0):
        assert interval_over_games([share] * 20, tries=80) == wilson_interval(20 * share, 20)
    coins = interval_over_games([0.25, 0.5, 0.5, 0.75] * 20, tries=320)
    wide, narrow = wilson_interval(40, 80), wilson_interval(160, 320)
    assert wide[0] < coins[0] <= narrow[0]
    assert interval_over_games([0.5], tries=4) == wilson_interval(0.5, 1), "one game says little"


def test_a_mean_over_games_lies_outside_its_interval_more_often_than_told() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(400):  # games of unlike difficulty, won 60 % of the time on average
        chance = (torch.rand(30, generator=generator) < 0.6) * 0.8 + 0.12
        wins = (torch.rand(30, 4, generator=generator) < chance[:, None]).double().mean(dim=1)
        low, high = interval_over_games(wins.tolist(), tries=120)
        hits += low <= 0.6 <= high
    assert 0.92 <= hits / 400 <= 0.98


def test_pass_at_k_is_not_the_share_of_all_choices_of_k_tries() -> None:
    for n in range(1, 6):
        for c in range(n + 1):
            for k in range(1, n + 1):
                chosen = [*combinations([True] * c + [False] * (n - c), k)]
                assert pass_at_k(c, n, k) == pytest.approx(sum(map(any, chosen)) / len(chosen))
                assert pass_hat_k(c, n, k) == pytest.approx(sum(map(all, chosen)) / len(chosen))
    for bad in ((1, 2, 3), (3, 2, 1), (0, 2, 0)):
        with pytest.raises(ValueError, match="k must be 1 to the number of tries"):
            pass_at_k(*bad)


@pytest.mark.parametrize("given", [(0, 0), (3, 2), (-1, 2)])
def test_wilson_interval_refuses_what_is_no_rate(given: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="wilson_interval"):
        wilson_interval(*given)


def test_summary_counts_by_type_and_leaves_broken_episodes_out() -> None:
    summary = success_summary(EPISODES)
    assert (summary["rate"], summary["episodes"], summary["infra_errors"]) == (0.5, 4, 1)
    assert summary["score"] == 2.25 / 4
    assert (summary["low"], summary["high"]) == wilson_interval(2, 4)
    assert list(summary["by_type"]) == ["heat", "made_up", "pick"]
    low, high = wilson_interval(1, 1)
    assert summary["by_type"]["heat"] == {"rate": 1.0, "low": low, "high": high, "episodes": 1}


@pytest.mark.parametrize(("given", "why"), [([], ""), (EPISODES[-1:], ".*worker died")])
def test_summary_of_no_episode_is_an_error_that_says_how_many_came(
    given: list[Trajectory], why: str
) -> None:
    with pytest.raises(NothingToJudgeError, match=f"{len(given)} given, {len(given)} broken{why}"):
        success_summary(given)
