from __future__ import annotations

import pytest
import torch

from aem_lightning.metrics import (
    EpisodeMetrics,
    NothingToJudgeError,
    success_summary,
    wilson_interval,
)
from aem_lightning.types import Task, Trajectory, Turn


def turn(action: str | None = "look", is_valid: bool = True, reward: float = 0.0) -> Turn:
    return Turn("see", ("look",), "r", action, 0, 0, [-1.0], None, reward=reward, is_valid=is_valid)


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
