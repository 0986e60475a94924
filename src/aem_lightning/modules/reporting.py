"""What an iteration reports about its episodes."""

from __future__ import annotations

from typing import Any

from aem_lightning.functional.segments import segment_ids, segment_range
from aem_lightning.types import Iteration


def environment_metrics(pool: Any) -> dict[str, float]:
    """What the environments of ``pool`` count: shares, each where the environment counts it.

    The hit rate of their memory, and of what was graded the share that reached for the tests. They
    cover everything played since the last report, evaluations included.
    """
    counts: dict[str, int] = getattr(pool, "counters", dict)()
    metrics = {}
    if "cache_hits" in counts:
        asked = counts["cache_hits"] + counts["cache_misses"]
        metrics["rollout/environment_cache_hits"] = counts["cache_hits"] / max(1, asked)
    if "tampered" in counts:
        metrics["rollout/tampered"] = counts["tampered"] / max(1, counts["graded"])
    return metrics


def rollout_metrics(done: Iteration) -> dict[str, float]:
    """Scalars of one iteration's episodes: outcome, length, and how mixed the groups are.

    Outcomes and counts of groups are over everything that was played, also what dynamic sampling
    left out; the other scalars are over what is trained on.
    """
    trajectories, batch = done.trajectories, done.batch
    played = done.played
    groups, dropped = ({t.group for t in part} for part in (played, done.dropped))
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    low, high = segment_range(batch.returns, *segment_ids(batch.group))
    tokens = int(batch.length.sum())
    inadmissible = sum(turn.action is not None and not turn.is_valid for turn in turns)
    return {
        "train/success_rate": sum(t.won for t in played) / len(played),
        "train/score": sum(t.score for t in played) / len(played),
        "train/return": sum(t.total_reward for t in played) / len(played),
        "rollout/turns": len(turns) / len(trajectories),
        "rollout/response_tokens": tokens / len(turns),
        "rollout/malformed_rate": sum(turn.action is None for turn in turns) / len(turns),
        "rollout/inadmissible_rate": inadmissible / len(turns),
        "rollout/truncated_rate": sum(t.truncated for t in trajectories) / len(trajectories),
        "rollout/infra_errors": float(sum(t.infra_error is not None for t in trajectories)),
        "rollout/mixed_groups": float((high > low).sum()) / len(groups),
        "rollout/groups_played": float(len(groups)),
        "rollout/groups_dropped": float(len(dropped)),
        "rollout/collection_rounds": 1.0 + max(t.round for t in played),
        "rollout/entropy": float((batch.entropy * batch.length).sum() / tokens),
        "rollout/skipped_update": float(done.skipped is not None),
        "rollout/entropy_from_trainer": float(done.entropy_source == "trainer"),
    }
