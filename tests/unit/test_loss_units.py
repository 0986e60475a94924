"""The gradient of an update, whatever its micro-batches and ranks are."""

from dataclasses import replace

import pytest
import torch
from tiny_play import make_policy

from aem_lightning.algorithms import PPO, ClippedLoss
from aem_lightning.modules.batching import trained_units
from aem_lightning.modules.memory import TokenBudget
from aem_lightning.modules.scoring import Objective, fill_values
from aem_lightning.rollout import pack
from aem_lightning.types import Task, Trajectory, Turn


def make_trajectories():
    """Four transcripts of unequal turns and lengths; the third is out of the loss."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for n, lengths in enumerate([[2, 5], [1], [3, 3], [4, 1, 2]]):
        row, turns = [], []
        for length in lengths:
            row += torch.randint(3, 20, (4,), generator=generator).tolist()
            logprobs = (-torch.rand(length, generator=generator)).tolist()
            turns.append(Turn("o", (), "r", "a", 0, len(row), logprobs, [0.5] * length))
            row += torch.randint(3, 20, (length,), generator=generator).tolist()
        turns[-1].reward = float(n % 2)
        made.append(Trajectory(Task("t"), n // 2, n % 2, turns, [row]))
    made[2].infra_error = "died"
    return made


LOSSES = {
    "token": ClippedLoss(kl_coef=0.0),
    "sequence": ClippedLoss(kl_coef=0.0, aggregation="sequence"),
    "constant": ClippedLoss(kl_coef=0.0, aggregation="constant", constant=6),
    "gspo": ClippedLoss(kl_coef=0.0, aggregation="sequence", ratio="sequence"),
}


def objective_of(policy, batch, advantages, loss, critic, packed):
    if critic is not None:
        fill_values(policy, batch, critic, TokenBudget(10_000, packed=packed))
    options = {"on_policy": False, "packed": packed, "critic": critic}
    return Objective(policy, batch, advantages, loss, 1.0, **options)


def gradient(policy, batches, micro, loss, critic=None, packed=False):
    """Of one update whose ranks hold ``batches``; every rank cuts its rows into ``micro``."""
    units = sum(trained_units(batch, loss.aggregation).sum() for batch in batches)
    policy.zero_grad()
    for batch in batches:
        advantages = 1.0 + batch.length.float() / 7
        rows = list(range(len(batch.row_length)))
        objective = objective_of(policy, batch, advantages, loss, critic, packed)
        for part in [rows[i : i + micro] for i in range(0, len(rows), micro)]:
            (objective(part).loss / units).backward()
    return {name: p.grad.clone() for name, p in policy.trainable().items()}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("critic", [None, PPO(value_coef=0.01, train_trunk=True)])
def test_micro_batches_or_ranks_change_the_gradient(name, critic):
    policy, played = make_policy(awake=True), make_trajectories()
    if critic is not None:
        policy.add_value_head()
        torch.nn.init.ones_(policy.value_head.linear.weight)
    whole = gradient(policy, [pack(played)], 4, LOSSES[name], critic)
    assert any(value.abs().max() > 1e-4 for value in whole.values())
    for batches, micro, packed in (
        ([played], 1, False),
        ([played[:1], played[1:]], 4, False),
        ([played], 3, False),
        ([played], 3, True),
    ):
        packs = [pack(part) for part in batches]
        found = gradient(policy, packs, micro, LOSSES[name], critic, packed)
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-7)


def test_units_count_masked_tokens_or_miss_responses():
    batch = pack(make_trajectories())
    assert trained_units(batch, "token").tolist() == [7, 1, 0, 7]
    assert trained_units(batch, "sequence").tolist() == [2, 1, 0, 3]
    assert trained_units(batch, "constant").tolist() == [2, 1, 0, 3]
    empty = replace(batch, response_index=torch.full_like(batch.response_index, -1))
    assert not trained_units(empty, "sequence").any()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("critic", [None, PPO()])
def test_a_rank_without_rows_logs_other_names(name, critic):
    policy, batch = make_policy(awake=True), pack(make_trajectories())
    if critic is not None:
        policy.add_value_head()
    ones = torch.ones(batch.num_responses)
    objective = objective_of(policy, batch, ones, LOSSES[name], critic, packed=True)
    none = objective.no_stats()
    assert list(none) == list(objective([0, 1]).stats)
    assert not any(value.any() for value in none.values())
