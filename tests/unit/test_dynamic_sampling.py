import logging

import pytest
from coin import CoinEnv
from local_coin import local_data, make_agent, make_trainer
from runs import Keep
from tiny_play import PLAIN, LocalPool, Script, coin_task, word_tokenizer

from aem_lightning.modules import RolloutSettings
from aem_lightning.modules.dynamic_sampling import (
    GroupSource,
    draw_tasks,
    mixed_groups,
    split_groups,
)
from aem_lightning.modules.reporting import rollout_metrics
from aem_lightning.rollout import Collector, PromptEncoder, RewardShaping, make_groups
from aem_lightning.types import Trajectory, Turn

TASKS = [coin_task(i) for i in range(20)]


class StubCollector:
    """Plays episodes at once: the copies of a task in ``mixed`` earn differently."""

    environment_seconds = 0.5

    def __init__(self, seed, mixed, log):
        self.seed, self.mixed, self.log = seed, mixed, log

    def collect(self, episodes, *, seed):
        self.log.append((self.seed, [(e.task.id, e.group) for e in episodes if e.copy == 0]))
        return [
            Trajectory(
                e.task,
                e.group,
                e.copy,
                [turn(float(e.copy) if e.task.id in self.mixed else 0.0)],
            )
            for e in episodes
        ]


def turn(reward):
    return Turn("o", (), "r", "a", 0, 0, [-1.0], [0.1], reward=reward)


def source(mixed):
    log = []
    made = GroupSource(
        collector=lambda seed: StubCollector(seed, mixed, log),
        group_size=2,
        tasks=lambda: TASKS,
        key=("train", 7),
        environment_seed=3,
    )
    return made, log


def test_a_mixed_batch_is_collected_again():
    made, log = source({task.id for task in TASKS})
    played = made.collect(TASKS[:3], rounds=10)
    assert len(log) == 1
    assert log[0][0] == ("train", 7)
    assert split_groups(played, RolloutSettings(collection_rounds=10)) == (played, [])


def test_uniform_groups_are_not_replaced_by_as_many_new_tasks():
    made, log = source({task.id for task in TASKS[16:]})
    played = made.collect(TASKS[:4], rounds=30)
    assert log[0][1] == [(task.id, i) for i, task in enumerate(TASKS[:4])]
    seen = [task for _, groups in log for task, _ in groups]
    assert len(seen) == len(set(seen)), "a task was played twice"
    numbers = [group for _, groups in log for _, group in groups]
    assert numbers == list(range(len(seen)))
    assert len({seed for seed, _ in log}) == len(log), "two rounds sample with one seed"
    kept, dropped = split_groups(played, RolloutSettings(collection_rounds=30))
    assert len({t.group for t in kept}) == 4
    assert not mixed_groups(dropped)
    assert len(kept) + len(dropped) == len(played) == 2 * len(seen)
    assert [t.round for t in played] == sorted(t.round for t in played)
    missing = [4]
    for number in range(len(log)):
        assert len(log[number][1]) == missing[-1]
        missing.append(4 - len({t.group for t in kept if t.round <= number}))
    assert made.environment_seconds == 0.5 * len(log)


def test_collection_goes_on_without_end_where_every_group_is_uniform():
    made, log = source(set())
    played = made.collect(TASKS[:2], rounds=10)
    assert len(log) == 10
    kept, dropped = split_groups(played, RolloutSettings(collection_rounds=10))
    assert {t.round for t in kept} == {0}
    assert len(kept) == 4
    assert len(dropped) == 36


def test_broken_episodes_make_a_group_mixed():
    made, _ = source({TASKS[0].id})
    played = made.collect(TASKS[:1], rounds=1)
    assert mixed_groups(played) == {0}
    played[1].infra_error = "died"
    assert mixed_groups(played) == set()


def test_the_same_rewards_in_another_order_make_a_group_mixed():
    orders = ([-0.1, -0.1, -0.1, 10.0], [10.0, -0.1, -0.1, -0.1])  # wins with invalid actions
    assert len({sum(rewards) for rewards in orders}) == 2, "in the order of the turns they differ"
    played = [
        Trajectory(TASKS[0], 0, copy, [turn(reward) for reward in rewards], [])
        for copy, rewards in enumerate(orders)
    ]
    assert mixed_groups(played) == set()


def test_new_tasks_depend_on_more_than_the_seed_or_run_out():
    assert draw_tasks(TASKS, 5, set(), 1) == draw_tasks(TASKS, 5, set(), 1)
    assert draw_tasks(TASKS, 5, set(), 1) != draw_tasks(TASKS, 5, set(), 2)
    played = {task.id for task in TASKS[:18]}
    assert {task.id for task in draw_tasks(TASKS, 2, played, 1)} == {"train/18", "train/19"}
    assert len(draw_tasks(TASKS, 5, played, 1)) == 5


def test_an_iteration_reports_kept_episodes_alone_or_counts_wrongly(caplog):
    class ByTask:
        """Rewards that are mixed for the copies of some tasks only."""

        count = 0

        def __call__(self, step, *, malformed):
            self.count += 1
            return float(self.count % 5 == 0) if self.count <= 40 else 0.0

    settings = RolloutSettings(
        group_size=2, max_turns=1, max_new_tokens=4, max_context=96, collection_rounds=3
    )
    agent = make_agent(rollout=settings, rewards=ByTask())
    keep = Keep()
    with caplog.at_level(logging.INFO):
        make_trainer(callbacks=[keep]).fit(agent, datamodule=local_data())
    done = keep.iterations[0]
    metrics = rollout_metrics(done)
    groups = {t.group for t in done.trajectories}
    assert metrics["rollout/groups_dropped"] == len({t.group for t in done.dropped})
    assert metrics["rollout/groups_played"] == len(groups) + metrics["rollout/groups_dropped"]
    assert metrics["rollout/mixed_groups"] == len(groups) / metrics["rollout/groups_played"]
    assert metrics["rollout/collection_rounds"] <= 3
    assert done.dropped
    assert "groups kept" in caplog.text
    assert len(done.batch.group) == len(done.trajectories)


class Fickle(CoinEnv):
    """Starts elsewhere at each reset, whatever the task and the seed."""

    resets = 0

    def reset(self, **options):
        observation, info = super().reset(**options)
        Fickle.resets += 1
        if self.part == "observation":
            observation += f" Reset {Fickle.resets} ."
        elif self.part == "admissible_actions":
            info["admissible_actions"] = info["admissible_actions"][Fickle.resets % 4 :]
        else:
            info["goal"] = f"find coin {Fickle.resets}"
        return observation, info


@pytest.mark.parametrize("part", ["observation", "admissible_actions", "goal"])
@pytest.mark.parametrize("concurrency", [1, 8])
def test_a_group_is_played_from_different_starts(part, concurrency):
    Fickle.part = part
    encoder = PromptEncoder(word_tokenizer(), PLAIN, "transcript")
    collector = Collector(
        LocalPool(Fickle),
        encoder,
        Script(encoder, "open white box"),
        RewardShaping(),
        max_turns=1,
        max_context=128,
        max_new_tokens=6,
        concurrency=concurrency,
    )
    with pytest.raises(ValueError, match=rf"Copies 0 and 1 of task 'train/3'.*{part} is"):
        collector.collect(make_groups([coin_task(3)], 2))
    # Groups of one task may: two groups are not compared.
    collector.pool.envs.clear()
    assert len(collector.collect(make_groups([coin_task(3), coin_task(3)], 1))) == 2
