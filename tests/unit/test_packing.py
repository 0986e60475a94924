import math
from dataclasses import fields

import pytest
import torch

from aem_lightning.rollout import micro_batches, minibatches, pack
from aem_lightning.types import Task, Trajectory, Turn


def make_turn(row, start, logprobs, entropies=None, observation="o", **changes):
    return Turn(observation, (), "r", "a", row, start, logprobs, entropies, **changes)


def make_trajectory(rows, turns, group=0, copy=0, **changes):
    task = Task(f"task-{group}")
    return Trajectory(task, group, copy, turns=turns, rows=rows, **changes)


def two_trajectories():
    """A transcript with two responses in one row, and a window trajectory with two rows."""
    transcript = make_trajectory(
        [[1, 2, 3, 4, 5, 6, 7]],
        [
            make_turn(0, 2, [-0.1, -0.2], [0.3, 0.5], "start", reward=1.0),
            make_turn(0, 5, [-0.4, -0.8], [0.1, 0.1], "later", reward=0.5, is_valid=False),
        ],
    )
    window = make_trajectory(
        [[1, 2, 3], [8, 9]],
        [make_turn(0, 1, [-1.0, -2.0], [1.0, 2.0], "start"), make_turn(1, 1, [-3.0], [4.0])],
        copy=1,
    )
    return [transcript, window]


def test_rows_are_padded_on_the_right_and_responses_numbered_in_order():
    batch = pack(two_trajectories(), pad_id=99)
    p = 99
    assert batch.input_ids.tolist() == [
        [1, 2, 3, 4, 5, 6, 7],
        [1, 2, 3, p, p, p, p],
        [8, 9, p, p, p, p, p],
    ]
    assert batch.row_length.tolist() == [7, 3, 2]
    assert batch.response_index.tolist() == [
        [-1, -1, 0, 0, -1, 1, 1],
        [-1, 2, 2, -1, -1, -1, -1],
        [-1, 3, -1, -1, -1, -1, -1],
    ]


def test_every_token_keeps_its_own_numbers():
    batch = pack(two_trajectories())
    logprobs = torch.tensor(
        [[0, 0, -0.1, -0.2, 0, -0.4, -0.8], [0, -1, -2, 0, 0, 0, 0], [0, -3, 0, 0, 0, 0, 0]]
    )
    entropies = torch.tensor(
        [[0, 0, 0.3, 0.5, 0, 0.1, 0.1], [0, 1, 2, 0, 0, 0, 0], [0, 4, 0, 0, 0, 0, 0]]
    )
    torch.testing.assert_close(batch.old_logprobs, logprobs.float())
    torch.testing.assert_close(batch.entropies, entropies.float())
    assert batch.ref_logprobs is None


def test_the_table_of_responses():
    batch = pack(two_trajectories())
    assert batch.trajectory.tolist() == [0, 0, 1, 1]
    assert batch.turn.tolist() == [0, 1, 0, 1]
    assert batch.length.tolist() == [2, 2, 2, 1]
    torch.testing.assert_close(batch.entropy, torch.tensor([0.4, 0.1, 1.5, 4.0]))
    torch.testing.assert_close(batch.surprisal, torch.tensor([0.3, 1.2, 3.0, 3.0]))
    assert batch.reward.tolist() == [1.0, 0.5, 0.0, 0.0]
    assert batch.valid.tolist() == [True, False, True, True]
    assert batch.num_responses == 4
    assert batch.num_trajectories == 2


def test_the_table_of_trajectories():
    first, second = two_trajectories()
    second.group = 7
    batch = pack([first, second])
    assert batch.group.tolist() == [0, 7]
    assert batch.response_group.tolist() == [0, 0, 7, 7]
    assert batch.returns.tolist() == [1.5, 0.0]
    assert batch.loss_mask.tolist() == [True, True]


def test_an_anchor_is_equal_exactly_where_group_and_observation_are():
    observations = [(0, "a"), (0, "b"), (0, "a"), (1, "a"), (1, "b")]
    rows = [[1, 2]]
    trajectories = [
        make_trajectory(rows, [make_turn(0, 1, [-1.0], [1.0], observation)], group)
        for group, observation in observations
    ]
    anchor = pack(trajectories).anchor.tolist()
    for i, one in enumerate(observations):
        for j, other in enumerate(observations):
            assert (anchor[i] == anchor[j]) == (one == other)


def test_a_broken_or_empty_trajectory_leaves_the_loss_and_keeps_its_place():
    good, broken = two_trajectories()
    broken.infra_error = "died"
    empty = make_trajectory([], [], copy=2)
    batch = pack([good, broken, empty])
    assert batch.loss_mask.tolist() == [True, False, False]
    assert batch.response_mask.tolist() == [True, True, False, False]
    assert batch.num_trajectories == 3


def test_a_broken_trajectorys_rewards_reach_no_estimator():
    good, broken = two_trajectories()
    broken.infra_error, broken.turns[0].reward = "died", math.nan
    batch = pack([good, broken])
    assert batch.returns.tolist() == [1.5, 0.0]
    assert batch.reward.tolist() == [1.0, 0.5, 0.0, 0.0]


def test_entropies_that_no_engine_gave_are_zero():
    batch = pack([make_trajectory([[1, 2]], [make_turn(0, 1, [-1.0], None)])])
    assert not batch.entropies.any()
    assert batch.entropy.tolist() == [0.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["logprobs", "entropies"])
def test_a_number_that_is_not_finite_names_episode_task_and_turn(value, which):
    first, second = two_trajectories()
    second.group = 3
    second.task = Task("valid/7")
    getattr(second.turns[1], which)[0] = value
    with pytest.raises(ValueError, match=r"episode 3/1 \(task 'valid/7'\), turn 1.*optimizer\.lr"):
        pack([first, second])


def test_without_a_single_response_there_is_nothing_to_train_on():
    with pytest.raises(ValueError, match="None of the 2 trajectories"):
        pack([make_trajectory([], []), make_trajectory([], [], copy=1)])


def test_a_rank_without_a_response_has_a_batch_without_a_row():
    broken = make_trajectory([], [], copy=1)
    broken.infra_error = "died"
    for trajectories in ([broken], []):
        batch = pack(trajectories, may_be_empty=True)
        assert batch.input_ids.shape == (0, 0)
        assert batch.num_responses == 0
        assert batch.judged.tolist() == [False] * len(trajectories)
        full = pack(two_trajectories())
        for column in fields(batch):
            values = getattr(batch, column.name), getattr(full, column.name)
            assert (values[0] is None) == (values[1] is None)
            assert values[0] is None or values[0].dtype == values[1].dtype, column.name


def test_a_batch_moves_with_all_its_tensors():
    batch = pack(two_trajectories()).to("meta")
    columns = {f.name: getattr(batch, f.name) for f in fields(batch)}
    missing = {name for name, column in columns.items() if column is None}
    assert missing == {"ref_logprobs", "action_mask", "values", "value_targets"}
    assert {str(c.device) for c in columns.values() if c is not None} == {"meta"}


def test_micro_batches_stay_within_the_budget_and_hold_every_row_once():
    lengths = torch.randint(1, 60, (101,), generator=torch.Generator().manual_seed(0))
    rows = list(range(0, 101, 2))
    batches = micro_batches(rows, lengths, 128)
    assert sorted(row for batch in batches for row in batch) == rows
    sizes = [len(batch) * max(int(lengths[row]) for row in batch) for batch in batches]
    assert max(sizes) <= 128
    assert sum(sizes) > 100 * len(sizes)  # the budget is used, not merely kept


def test_the_longest_micro_batch_comes_first_so_that_memory_is_tried_at_once():
    lengths = torch.tensor([3, 9, 5, 9])
    assert micro_batches([0, 1, 2, 3], lengths, 18) == [[1, 3], [2, 0]]
    assert micro_batches([0, 1, 2], torch.tensor([50, 4, 4]), 10) == [[0], [1, 2]], "one over it"
    assert micro_batches([], lengths, 18) == []


@pytest.mark.parametrize(("rows", "count"), [(10, 4), (3, 4), (0, 2), (8, 1)])
def test_minibatches_are_a_partition_into_a_fixed_number(rows, count):
    parts = minibatches(rows, count, torch.Generator().manual_seed(0))
    assert len(parts) == count
    assert sorted(row for part in parts for row in part) == list(range(rows))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_minibatches_are_shuffled_by_their_generator_alone():
    once = minibatches(20, 4, torch.Generator().manual_seed(1))
    assert once == minibatches(20, 4, torch.Generator().manual_seed(1))
    assert once != minibatches(20, 4, torch.Generator().manual_seed(2))
