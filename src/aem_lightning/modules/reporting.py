"""What an iteration reports about its episodes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from aem_lightning.collectives import of_each_rank
from aem_lightning.modules.batching import entropy_sums
from aem_lightning.modules.dynamic_sampling import judged, mixed_groups
from aem_lightning.rollout import hidden_states
from aem_lightning.types import Iteration, malformed_kinds

Share = tuple[float, float]  # a sum, and how many it is over
MALFORMED = "rollout/malformed_rate"  # below it, one for each kind that occurred


def environment_metrics(pool: Any) -> dict[str, float]:
    """What the environments of ``pool`` count: shares, each where the environment counts it.

    The hit rate of their memory, and of what was graded the share that reached for the tests. They
    cover everything played since the last report, evaluations included, on all ranks: every rank
    must call it.
    """
    counts: dict[str, float] = getattr(pool, "counters", dict)()
    shares, added = dict[str, Share](), dict[str, float]()
    if quarantined := getattr(pool, "quarantine", None):
        added["rollout/quarantined_tasks"] = float(len(quarantined))
    if "cache_hits" in counts:
        asked = counts["cache_hits"] + counts["cache_misses"]
        shares["rollout/environment_cache_hits"] = counts["cache_hits"], max(1, asked)
    if "tampered" in counts:
        shares["rollout/tampered"] = counts["tampered"], max(1, counts["graded"])
    return over_ranks(shares, added)


def rollout_metrics(done: Iteration) -> dict[str, float]:
    """Scalars of one iteration's episodes: outcome, length, and how mixed the groups are.

    Outcomes and counts of groups are over everything that was played, also what dynamic sampling
    left out; the other scalars are over what is trained on. Episodes that something outside the
    policy broke are counted, and in nothing else. Means over nothing are left out. They are those
    of all ranks: every rank must call it.
    """
    batch = done.batch
    played, trained = judged(done.played), judged(done.trajectories)
    groups, dropped = ({t.group for t in part} for part in (done.played, done.dropped))
    turns = [turn for trajectory in trained for turn in trajectory.turns]
    entropy, tokens = entropy_sums(batch).tolist()
    shares: dict[str, Share] = {
        "train/success_rate": (sum(t.won for t in played), len(played)),
        "train/score": (sum(t.score for t in played), len(played)),
        "train/return": (sum(t.total_reward for t in played), len(played)),
        "rollout/turns": (len(turns), len(trained)),
        "rollout/response_tokens": (sum(turn.length for turn in turns), len(turns)),
        MALFORMED: (sum(turn.action is None for turn in turns), len(turns)),
        **{
            f"{MALFORMED}/{kind.replace(' ', '_')}": (count, len(turns))
            for kind, count in malformed_kinds(turns).items()
        },
        "rollout/inadmissible_rate": (
            sum(turn.action is not None and not turn.is_valid for turn in turns),
            len(turns),
        ),
        "rollout/truncated_rate": (sum(t.truncated for t in trained), len(trained)),
        "rollout/hidden_states": hidden_states(trained),
        "rollout/mixed_groups": (len(mixed_groups(done.trajectories)), len(groups)),
        "rollout/entropy": (entropy, tokens),
    }
    added = {
        "rollout/infra_errors": float(sum(t.infra_error is not None for t in done.played)),
        "rollout/groups_played": float(len(groups)),
        "rollout/groups_dropped": float(len(dropped)),
    }
    rounds = of_each_rank(max((t.round for t in done.played), default=0))
    return {
        **over_ranks(shares, added),
        "rollout/collection_rounds": 1.0 + max(rounds),
        "rollout/skipped_update": float(done.skipped is not None),
        **({} if done.lag is None else {"rollout/staleness": float(done.lag)}),
        "rollout/entropy_from_trainer": float(done.entropy_source == "trainer"),
    }


def over_ranks(shares: Mapping[str, Share], added: Mapping[str, float]) -> dict[str, float]:
    """The means of ``shares`` and the counts ``added`` up, as one process would have them.

    Means over nothing are left out. Every rank must call it, and may have names of its own; one
    without a kind of malformed response has none of it among its own.
    """
    total, over, counts = (defaultdict[str, float](float) for _ in range(3))
    for theirs, also in of_each_rank((shares, added)):
        for name, (value, number) in theirs.items():
            total[name] += value
            over[name] += number
        for name, value in also.items():
            counts[name] += value
    over |= {name: over[MALFORMED] for name in total if name.startswith(MALFORMED)}
    return {**{name: total[name] / over[name] for name in total if over[name]}, **counts}


def shown(metrics: Mapping[str, float]) -> dict[str, float]:
    """What a person sees of an iteration while it runs; NaN where there was nothing to judge."""
    names = {
        "success": "train/success_rate",
        "entropy": "rollout/entropy",
        "mixed_groups": "rollout/mixed_groups",
    }
    return {short: metrics.get(name, math.nan) for short, name in names.items()}
