import logging

import pytest
from coin import CoinDataModule
from tiny_play import coin_task

from aem_lightning.datamodules import AlfworldDataModule
from aem_lightning.datamodules.agent import TaskSampler
from aem_lightning.envs.alfworld import games_hash, list_games
from aem_lightning.types import ResetRequest

SIZES = {"train": 10, "valid_seen": 7, "valid_unseen": 5}


class StubTrainer:
    """What a DataModule asks of a trainer."""

    lightning_module, current_epoch = None, 0

    def __init__(self, rank, world_size):
        self.global_rank, self.world_size = rank, world_size


def sampler(epoch=0, rank=0, world_size=1, *, tasks=10, per_iteration=4, seed=0):
    made = TaskSampler(tasks, per_iteration, 3, seed, rank, world_size)
    made.set_epoch(epoch)
    return made


def iterations(epoch, world_size=1):
    """The tasks of each iteration of an epoch, over all ranks."""
    shares = [list(sampler(epoch, rank, world_size)) for rank in range(world_size)]
    sizes = [len(share) // 3 for share in shares]
    return [
        [t for share, n in zip(shares, sizes, strict=True) for t in share[i * n : (i + 1) * n]]
        for i in range(3)
    ]


def test_an_epochs_tasks_do_not_depend_on_the_epochs_before_it():
    whole_run = sampler()
    for epoch in range(3):
        whole_run.set_epoch(epoch)
        assert list(whole_run) == list(sampler(epoch))


def test_another_seed_is_another_order():
    assert list(sampler(seed=0)) != list(sampler(seed=1))


def test_every_task_is_played_once_before_any_is_played_again():
    drawn = [task for epoch in range(5) for task in sampler(epoch)]
    assert len(drawn) == 60
    passes = [drawn[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(part) == list(range(10)) for part in passes)
    assert len({tuple(part) for part in passes}) == 6


def test_a_run_that_goes_on_repeats_or_skips_a_task():
    def played(per_epoch, per_iteration, epochs, **where):
        made = TaskSampler(10, per_iteration, per_epoch, seed=0, **where)
        found = []
        for epoch in epochs:
            made.set_epoch(epoch)
            assert len(list(made)) == len(made)
            found += list(made)
        return found

    stream = played(1, 4, range(9))
    assert played(3, 4, range(3)) == stream
    # After five iterations of four tasks: epochs of another length, then iterations of three.
    assert played(2, 4, range(2, 5), start=5, played=20, end=9) == stream[20:]
    assert played(4, 3, range(1, 3), start=5, played=20, end=10) == stream[20:35]
    assert played(4, 3, range(3, 5), start=5, played=20, end=10) == []


@pytest.mark.parametrize("world_size", [2, 3, 4, 7])
def test_more_ranks_share_out_the_same_tasks(world_size):
    assert [iterations(epoch, world_size) for epoch in range(2)] == [
        iterations(epoch) for epoch in range(2)
    ]


def test_the_sampler_knows_its_length():
    for world_size in (1, 2):
        made = sampler(world_size=world_size)
        assert len(list(made)) == len(made) == 12 // world_size


def test_a_rank_without_a_task_has_fewer_iterations_than_the_others():
    for rank, size in enumerate([1, 1, 0]):
        datamodule = CoinDataModule(SIZES, tasks_per_iteration=2, iterations_per_epoch=3)
        datamodule.trainer = StubTrainer(rank, 3)
        assert [len(batch) for batch in datamodule.train_dataloader()] == [size] * 3


def test_an_epoch_is_iterations_of_whole_task_lists():
    datamodule = CoinDataModule(SIZES, tasks_per_iteration=4, iterations_per_epoch=3)
    batches = list(datamodule.train_dataloader())
    assert [len(batch) for batch in batches] == [4, 4, 4]
    assert all(task.split == "train" for batch in batches for task in batch)


def validation(validation_tasks, rank=0, world_size=1):
    datamodule = CoinDataModule(SIZES, validation_tasks=validation_tasks, evaluation_batch=3)
    datamodule.trainer = StubTrainer(rank, world_size)
    return [task for batch in datamodule.val_dataloader() for task in batch]


def test_validation_plays_the_same_evenly_spaced_tasks_every_time():
    everything = validation(99)
    assert len(everything) == 12
    chosen = validation(4)
    assert [everything.index(task) for task in chosen] == [0, 3, 6, 9]
    assert chosen == validation(4)
    assert {task.split for task in chosen} == {"valid_seen", "valid_unseen"}


def test_ranks_share_out_the_validation_without_overlap():
    shares = [validation(5, rank, 2) for rank in range(2)]
    assert [len(share) for share in shares] == [3, 2]
    assert {task.id for share in shares for task in share} == {t.id for t in validation(5)}


def test_an_evaluation_plays_every_task_of_every_split_once():
    datamodule = CoinDataModule(SIZES, evaluation_batch=3)
    loaders = datamodule.test_dataloader()
    played = [[task for batch in loader for task in batch] for loader in loaders]
    assert [[task.id for task in part] for part in played] == [
        [f"valid_seen/{i}" for i in range(7)],
        [f"valid_unseen/{i}" for i in range(5)],
    ]


def test_the_task_types_are_those_of_every_split():
    datamodule = CoinDataModule({"train": 1, "valid_seen": 1, "valid_unseen": 3})
    assert datamodule.task_types() == ["blue", "green", "red"]


def test_closing_stops_the_workers_and_the_next_use_starts_them_again():
    datamodule = CoinDataModule(workers=1)
    try:
        for _ in range(2):
            first = datamodule.pool
            assert datamodule.pool is first
            steps = first.reset({"0/0": ResetRequest("train/1")})
            assert steps["0/0"].observation == "A coin glints near the blue box ."
            datamodule.close()
            assert datamodule.pool is not first
    finally:
        datamodule.close()


def test_an_environment_without_an_expert_says_what_to_do_instead():
    from aem_lightning.datamodules import AgentDataModule

    class Bare(AgentDataModule):
        tasks = env_factory = None

    with pytest.raises(ValueError, match=r"Bare has no expert.*make_expert.*policy="):
        Bare().make_expert(coin_task(0), 0)
    assert Bare().vocabulary() == []


def test_games_are_read_from_the_official_layout(alfworld_root):
    datamodule = AlfworldDataModule(str(alfworld_root))
    tasks = datamodule.tasks("train")
    assert len(tasks) == 6
    assert [task.id for task in tasks] == sorted(task.id for task in tasks)
    for task in tasks:
        assert (alfworld_root / "json_2.1.1" / task.id / "game.tw-pddl").is_file()
        assert task.split == "train"
    assert set(datamodule.task_types()) >= {task.type for task in tasks}


def test_the_hash_of_the_games_is_logged_and_reported(alfworld_root, caplog):
    datamodule = AlfworldDataModule(str(alfworld_root))
    expected = games_hash(list_games(alfworld_root, "train"))
    with caplog.at_level(logging.INFO):
        hashes = datamodule.game_hashes()
    assert hashes["train"] == expected
    assert len(set(hashes.values())) == 3
    assert f"train: 6 games, hash {expected}, in {alfworld_root}" in caplog.messages


def test_only_the_wanted_task_types_are_kept(alfworld_root):
    kinds = AlfworldDataModule(str(alfworld_root)).task_types()
    datamodule = AlfworldDataModule(str(alfworld_root), task_types=kinds[:1])
    assert {task.type for task in datamodule.tasks("train")} == set(kinds[:1])


def test_environment_and_expert_play_a_listed_task(alfworld_root):
    datamodule = AlfworldDataModule(str(alfworld_root))
    task = datamodule.tasks("train")[0]
    env = datamodule.env_factory()()
    try:
        observation, info = env.reset(seed=0, options={"task_id": task.id})
        action = datamodule.make_expert(task, 0).act(observation, info["admissible_actions"])
        assert action in info["admissible_actions"]
    finally:
        env.close()
