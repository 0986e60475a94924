"""What an iteration reports about its episodes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from aem_lightning.algorithms.ranks import of_each_rank
from aem_lightning.modules.batching import entropy_sums
from aem_lightning.modules.dynamic_sampling import judged, mixed_groups
from aem_lightning.types import Iteration, Trajectory


def environment_metrics(pool: Any) -> dict[str, float]:
    """What the environments of ``pool`` count: shares, each where the environment counts it.

    The hit rate of their memory, and of what was graded the share that reached for the tests. They
    cover everything played since the last report, evaluations included.
    """
    counts: dict[str, float] = getattr(pool, "counters", dict)()
    metrics = {}
    if quarantined := getattr(pool, "quarantine", None):
        metrics["rollout/quarantined_tasks"] = float(len(quarantined))
    if "cache_hits" in counts:
        asked = counts["cache_hits"] + counts["cache_misses"]
        metrics["rollout/environment_cache_hits"] = counts["cache_hits"] / max(1, asked)
    if "tampered" in counts:
        metrics["rollout/tampered"] = counts["tampered"] / max(1, counts["graded"])
    return metrics


def rollout_metrics(done: Iteration) -> dict[str, float]:
    """Scalars of one iteration's episodes: outcome, length, and how mixed the groups are.

    Outcomes and counts of groups are over everything that was played, also what dynamic sampling
    left out; the other scalars are over what is trained on. Episodes that something outside the
    policy broke are counted, and in nothing else. Means over nothing are left out.
    """
    batch = done.batch
    played, trained = judged(done.played), judged(done.trajectories)
    groups, dropped = ({t.group for t in part} for part in (done.played, done.dropped))
    turns = [turn for trajectory in trained for turn in trajectory.turns]
    entropy, tokens = entropy_sums(batch).tolist()
    shares: dict[str, tuple[float, Collection[Any]]] = {
        "train/success_rate": (sum(t.won for t in played), played),
        "train/score": (sum(t.score for t in played), played),
        "train/return": (sum(t.total_reward for t in played), played),
        "rollout/turns": (len(turns), trained),
        "rollout/response_tokens": (sum(turn.length for turn in turns), turns),
        "rollout/malformed_rate": (sum(turn.action is None for turn in turns), turns),
        "rollout/inadmissible_rate": (
            sum(turn.action is not None and not turn.is_valid for turn in turns),
            turns,
        ),
        "rollout/truncated_rate": (sum(t.truncated for t in trained), trained),
        "rollout/mixed_groups": (len(mixed_groups(done.trajectories)), groups),
    }
    means = {name: total / len(over) for name, (total, over) in shares.items() if over}
    if tokens:
        means["rollout/entropy"] = entropy / tokens
    if done.lag is not None:
        means["rollout/staleness"] = float(done.lag)
    return {
        **means,
        "rollout/infra_errors": float(sum(t.infra_error is not None for t in done.played)),
        "rollout/groups_played": float(len(groups)),
        "rollout/groups_dropped": float(len(dropped)),
        "rollout/collection_rounds": 1.0 + max((t.round for t in done.played), default=0),
        "rollout/skipped_update": float(done.skipped is not None),
        "rollout/entropy_from_trainer": float(done.entropy_source == "trainer"),
    }


COUNTS = (
    "rollout/infra_errors",
    "rollout/quarantined_tasks",
    "rollout/groups_played",
    "rollout/groups_dropped",
)


def shown(metrics: Mapping[str, float]) -> dict[str, float]:
    """What a person sees of an iteration while it runs; NaN where there was nothing to judge."""
    names = {"success": "train/success_rate", "entropy": "rollout/entropy"}
    return {short: metrics.get(name, math.nan) for short, name in names.items()}


def over_ranks(metrics: dict[str, float], played: Sequence[Trajectory]) -> dict[str, float]:
    """Counts added up over ranks, and all else averaged: a rank weighs as many as it can judge.

    A rank without a metric, for it has nothing to average, does not count in it. Every rank must
    call it.

    Args:
        metrics: Of this rank.
        played: The episodes of this rank.
    """
    found = of_each_rank((metrics, len(judged(played))))
    if len(found) == 1:
        return metrics
    result = {}
    for name in dict.fromkeys(name for part, _ in found for name in part):
        values = [part[name] for part, _ in found if name in part]
        weights = [judged for part, judged in found if name in part]
        if name in COUNTS or not any(weights):
            result[name] = sum(values) if name in COUNTS else statistics.fmean(values)
        else:
            result[name] = statistics.fmean(values, weights)
    return result
