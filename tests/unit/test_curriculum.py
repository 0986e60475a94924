import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
from callback_stubs import make_iteration
from lightning.pytorch import Callback
from local_coin import local_data, make_agent, make_trainer
from tiny_play import coin_task

from aem_lightning.callbacks import HorizonGrowth, TaskWeights
from aem_lightning.callbacks.curriculum import draw_weighted, group_variances, horizon
from aem_lightning.types import Trajectory

TASKS = [coin_task(i) for i in range(8)]


class Recorder(Callback):
    def __init__(self):
        self.turns, self.played, self.validation = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trajectories = outputs["iteration"].trajectories
        self.turns.append(max(len(t.turns) for t in trajectories))
        self.played.append([t.task.id for t in trajectories if t.copy == 0])

    def on_validation_batch_end(self, trainer, pl_module, *_):
        self.validation.append(pl_module.rollout.max_turns)


def outputs(won):
    """The iteration that played ``won``: task number to the outcome of each copy."""
    trajectories = [
        Trajectory(TASKS[i], i, copy, won=outcome)
        for i, outcomes in won.items()
        for copy, outcome in enumerate(outcomes)
    ]
    return {"iteration": replace(make_iteration(0), trajectories=trajectories)}


def stubs(iteration=0, rank=0):
    data = SimpleNamespace(tasks=lambda split: TASKS, train_split="train")
    trainer = SimpleNamespace(
        datamodule=data, global_rank=rank, world_size=1, is_global_zero=False, loggers=[]
    )
    return trainer, SimpleNamespace(iteration=iteration)


def test_the_horizon_does_not_grow_to_the_whole():
    assert [horizon(i, 2, 8, 3) for i in range(5)] == [2, 4, 6, 8, 8]
    assert horizon(0, 20, 8, 3) == 8
    with pytest.raises(ValueError, match="start=0"):
        HorizonGrowth(0, 3)


def test_episodes_are_longer_than_the_horizon_or_validation_is_cut():
    recorder, agent = Recorder(), make_agent()
    agent.rollout = replace(agent.rollout, max_turns=3)
    callbacks = [HorizonGrowth(1, 2), recorder]
    make_trainer(3, callbacks=callbacks).fit(agent, datamodule=local_data())
    assert all(turns <= limit for turns, limit in zip(recorder.turns, (1, 2, 3), strict=True))
    assert recorder.turns[0] == 1 < recorder.turns[2]
    assert set(recorder.validation) == {3}
    assert agent.rollout.max_turns == 3


def test_variances_count_broken_episodes_or_forget_dropped_ones():
    done = outputs({0: [True, False], 1: [True, True]})["iteration"]
    done.trajectories[3].infra_error = "died"
    done.dropped = [Trajectory(TASKS[2], 9, 0, won=False)]
    assert group_variances(done) == {"train/0": 0.25, "train/1": 0.0, "train/2": 0.0}


def test_tasks_are_not_drawn_by_their_weights():
    counts = dict.fromkeys(range(4), 0)
    chooser = random.Random(0)
    for _ in range(4000):
        for task in draw_weighted(TASKS[:4], [0.1, 0.2, 0.3, 0.4], 1, chooser):
            counts[TASKS.index(task)] += 1
    assert [counts[i] / 4000 for i in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.03)
    assert len(draw_weighted(TASKS[:4], [1.0] * 4, 9, chooser)) == 4


def test_uniform_tasks_are_played_as_often_as_mixed_ones():
    callback = TaskWeights(share=1.0, floor=0.001, memory=0.0, seed=1)
    trainer, module = stubs()
    mixed = {0, 1}
    won = {i: [True, False] if i in mixed else [False, False] for i in range(8)}
    callback.on_train_batch_end(trainer, module, outputs(won), None, 0)
    again = TaskWeights(share=1.0, floor=0.001, seed=1)
    again.load_state_dict(callback.state_dict())
    drawn = []
    for iteration in range(40):
        batch, same = list(TASKS[2:4]), list(TASKS[2:4])
        trainer, module = stubs(iteration)
        callback.on_train_batch_start(trainer, module, batch, 0)
        again.on_train_batch_start(trainer, module, same, 0)
        assert batch == same, "a resumed run draws other tasks"
        assert len({task.id for task in batch}) == 2
        drawn += batch
    assert sum(TASKS.index(task) in mixed for task in drawn) > 0.9 * len(drawn)


def test_no_share_still_changes_the_tasks_and_a_whole_one_changes_nothing():
    trainer, module = stubs()
    batch = list(TASKS[:4])
    TaskWeights(share=0.0).on_train_batch_start(trainer, module, batch, 0)
    assert batch == TASKS[:4]
    with pytest.raises(ValueError, match="floor=0"):
        TaskWeights(floor=0.0)
    recorders = [Recorder(), Recorder()]
    for recorder, extra in zip(recorders, ([], [TaskWeights(share=1.0)]), strict=True):
        trainer = make_trainer(3, callbacks=[*extra, recorder])
        trainer.fit(make_agent(), datamodule=local_data())
    assert recorders[0].played != recorders[1].played
