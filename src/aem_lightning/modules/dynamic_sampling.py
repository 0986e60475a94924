"""Dynamic sampling: play on with new tasks until enough groups have something to compare."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import pstdev
from typing import Any

from aem_lightning.collectives import from_all_ranks, of_each_rank, this_rank
from aem_lightning.modules.settings import RolloutSettings
from aem_lightning.rollout import Collector, make_groups, stable_seed
from aem_lightning.types import Task, Trajectory

log = logging.getLogger(__name__)


@dataclass
class GroupSource:
    """Plays groups of one iteration, in as many rounds as it takes.

    Attributes:
        collector: A collector for a sampling seed.
        group_size: Copies of a task.
        tasks: Every training task; asked only when a further round needs new ones.
        key: Seed of the sampling, of all ranks; further rounds add their number.
        environment_seed: Seed of the environments' own randomness.
        must_fit: Raise where no opening prompt of the first round fits, on any rank.
        environment_seconds: Wall time spent waiting for environments so far.
    """

    collector: Callable[[tuple[object, ...]], Collector]
    group_size: int
    tasks: Callable[[], Sequence[Task]]
    key: tuple[object, ...]
    environment_seed: int
    must_fit: bool = False
    environment_seconds: float = 0.0

    def collect(self, tasks: Sequence[Task], rounds: int) -> list[Trajectory]:
        """Every episode of at most ``rounds`` collection rounds, of this rank.

        The first round plays ``tasks``; each further one as many new tasks as groups are still
        uniform (all copies earned the same). Source: DAPO, arXiv 2503.14476, section 3.2. Groups
        count over all ranks, which share out the new tasks: what is played, and with which draws,
        does not hang on their number.

        Raises:
            ValueError: No opening prompt fits.
        """
        played: list[Trajectory] = []
        shares, groups = of_each_rank([*tasks]), 0
        first = wanted = [task for share in shares for task in share]
        seen = {task.id for task in first}
        for number in range(rounds):
            if number:
                missing = len(first) - len(from_all_ranks([*mixed_groups(played)]))
                if not missing:
                    break
                seed = stable_seed(*self.key, "tasks", number)
                wanted = draw_tasks(self.tasks(), missing, seen, seed)
                shares = shared_out(wanted, len(shares))
                seen |= {task.id for task in wanted}
            played += self.play(shares, number, groups)
            if self.must_fit and not number:
                check_fit(played)
            groups += len(wanted)
        if reason := why_all_broke(played):
            log.warning("There is nothing to learn from in this iteration: %s", reason)
        return played

    def play(
        self, shares: Sequence[Sequence[Task]], number: int, first_group: int
    ) -> list[Trajectory]:
        """This rank's episodes of round ``number``, whose groups count from ``first_group``.

        ``shares`` are the tasks of each rank: groups count over all of them, and so do the repeats
        of a task, by which alone its groups draw differently.
        """
        before, mine = (
            self.group_size * sum(map(len, shares[:end])) for end in (this_rank(), this_rank() + 1)
        )
        tasks = [task for share in shares for task in share]
        episodes = make_groups(tasks, self.group_size, first_group)[before:mine]
        if not episodes:  # fewer tasks than ranks
            return []
        collector = self.collector((*self.key, "round", number) if number else self.key)
        played = collector.collect(episodes, seed=self.environment_seed)
        self.environment_seconds += collector.environment_seconds
        for trajectory in played:
            trajectory.round = number
        return played


def group_source(agent: Any, tasks: Sequence[Task], sampler: Any, iteration: int) -> GroupSource:
    """What plays the groups of an iteration of ``agent``.

    Args:
        agent: The agent; its engine has the weights of ``sampler``.
        tasks: Those of the first round.
        sampler: The policy that plays; whoever keeps rollouts asks what its weights are.
        iteration: Key of every draw.
    """
    data = agent.trainer.datamodule
    play = partial(agent.collector, agent.rollout.temperature)
    return GroupSource(
        collector=play if agent.recorded is None else agent.recorded(play, tasks, sampler),
        group_size=agent.rollout.group_size,
        tasks=lambda: data.tasks(data.train_split),
        key=("train", agent.seed, iteration, 0),
        environment_seed=stable_seed(agent.seed, iteration),
        must_fit=iteration == 0,  # a run that has played goes on without such a task
    )


def shared_out(tasks: Sequence[Task], ranks: int) -> list[list[Task]]:
    """``tasks`` in their order, as equal shares as can be, one for each of the ``ranks``."""
    bounds = [-(-rank * len(tasks) // ranks) for rank in range(ranks + 1)]
    return [list(tasks[a:b]) for a, b in pairwise(bounds)]


def draw_tasks(tasks: Sequence[Task], count: int, seen: set[str], seed: int) -> list[Task]:
    """``count`` random tasks that were not played yet; any tasks where too few are left."""
    fresh = [task for task in tasks if task.id not in seen]
    chooser = random.Random(seed)
    if len(fresh) >= count:
        return chooser.sample(fresh, count)
    return [chooser.choice(tasks) for _ in range(count)]


def mixed_groups(played: Sequence[Trajectory]) -> set[int]:
    """The groups whose copies did not all earn the same; broken episodes do not count."""
    earned: dict[int, set[float]] = {}
    for trajectory in judged(played):
        earned.setdefault(trajectory.group, set()).add(trajectory.total_reward)
    return {group for group, returns in earned.items() if len(returns) > 1}


def judged(played: Iterable[Trajectory]) -> list[Trajectory]:
    """The episodes that say something about the policy: nothing outside it broke them."""
    return [trajectory for trajectory in played if trajectory.turns and not trajectory.infra_error]


def check_fit(played: Sequence[Trajectory]) -> None:
    """Raise unless an opening prompt fits; what several ranks have played counts together.

    Raises:
        ValueError: None does, in the words of the first.
    """
    refused = [t.infra_error for t in played if t.truncated and not t.turns]
    ranks = of_each_rank((len(refused) < len(played), refused[:1]))
    reasons = [reason for _, told in ranks for reason in told]
    if reasons and not any(fits for fits, _ in ranks):
        raise ValueError(reasons[0])


def why_all_broke(played: Sequence[Trajectory]) -> str | None:
    """Why there is nothing to judge, in the environment's words; ``None`` where there is.

    What is ``played`` on several ranks counts together: every rank must call it.
    """
    told = [t.infra_error for t in played[-1:]]
    ranks = of_each_rank((len(played), len(judged(played)), told))
    counts, whole, reasons = zip(*ranks, strict=True)
    if not any(counts) or any(whole):
        return None
    (*_, last) = (reason for told in reasons for reason in told)
    return f"all {sum(counts)} episodes broke, the last: {last}"


def varied_groups(played: Sequence[Trajectory], share: float) -> set[int]:
    """The fewest groups of all ranks that hold ``share`` of the sum of their returns' deviations.

    Of equal ones the first come first; a uniform group is none of them. Source: RAGEN-2, arXiv
    2604.06268.
    """
    earned: dict[int, list[float]] = {}
    for trajectory in judged(played):
        earned.setdefault(trajectory.group, []).append(trajectory.total_reward)
    spread = dict(from_all_ranks([(group, pstdev(returns)) for group, returns in earned.items()]))
    left, kept = share * math.fsum(spread.values()), set[int]()
    for group in sorted(spread, key=lambda group: (-spread[group], group)):
        if left <= 1e-9:  # not 0: the sum is taken in another order
            break
        kept.add(group)
        left -= spread[group]
    return kept


def split_groups(
    played: Sequence[Trajectory], settings: RolloutSettings
) -> tuple[Sequence[Trajectory], Sequence[Trajectory]]:
    """The episodes to train on, and those of groups that a filter or dynamic sampling drops.

    With neither everything is kept. Where no group is mixed, on any rank, the first round is: an
    iteration needs a batch to report.
    """
    rounds = settings.collection_rounds
    if rounds == 1 and settings.filter is None:
        return played, []
    if settings.filter == "variance":
        mixed = varied_groups(played, settings.filter_share)
    else:
        mixed = {*from_all_ranks([*mixed_groups(played)])}
    mixed = mixed or {t.group for t in played if t.round == 0}
    kept = [trajectory for trajectory in played if trajectory.group in mixed]
    dropped = [trajectory for trajectory in played if trajectory.group not in mixed]
    log.info(
        "%d collection rounds of at most %d: %d groups kept, %d dropped",
        1 + max((trajectory.round for trajectory in played), default=0),
        rounds,
        len(mixed),
        len({trajectory.group for trajectory in dropped}),
    )
    return kept, dropped
