"""Rows that change no gradient: left out of every pass, without moving a weight."""

from dataclasses import replace

import pytest
import torch
from local_coin import make_agent
from test_agent_module import BlindEngine, VariedRewards, fit, weights

from aem_lightning.algorithms import EMPG, ClippedLoss, KLCov
from aem_lightning.modules import UpdateSettings, agent
from aem_lightning.modules.update import UpdatePlan, rows_with_gradient, sum_gradients
from aem_lightning.rollout import SlotEngine

NO_KL = ClippedLoss(kl_coef=0.0)


class EveryOther:
    """Advantages that are 0 in every other trajectory."""

    min_group_size = 2

    def __call__(self, batch):
        values = torch.tensor([0.0, 1.0, 0.0, -0.5] * 2)
        return values[batch.trajectory]


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=0.01)


def run(monkeypatch=None, **changes):
    """Agent, iteration, and the rows that each pass of the policy was given."""
    if monkeypatch is not None:
        monkeypatch.setattr(
            agent, "rows_with_gradient", lambda batch, *_, **__: batch.row_length > 0
        )
    settings = {"rewards": VariedRewards(), "estimator": EveryOther(), "optimizer": adam}
    made = make_agent(**{**settings, "loss": NO_KL, **changes})
    counts, hidden = {True: 0, False: 0}, made.policy.hidden_states

    def counting(ids, mask, lengths):
        counts[torch.is_grad_enabled()] += len(lengths)
        return hidden(ids, mask, lengths)

    made.policy.hidden_states = counting
    return made, fit(made).iterations[0], counts


def test_leaving_rows_out_moves_a_weight(monkeypatch):
    # A row a micro-batch: the sums are then the same to the bit. With six minibatches of eight rows
    # some have none that is active, and Adam's momentum moves the weights there too.
    update = UpdateSettings(update_epochs=2, num_minibatches=6, micro_batch_tokens=1)
    some, done, counts = run(update=update)
    every, other, all_counts = run(monkeypatch, update=update)
    assert (counts[True], all_counts[True]) == (8, 16)
    assert done.metrics["policy/dropped_rows"] == 0.5
    assert other.metrics["policy/dropped_rows"] == 0.0
    assert done.metrics["policy/grad_norm"] == other.metrics["policy/grad_norm"] > 0
    found, expected = weights(some), weights(every)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_old_log_probabilities_are_computed_of_rows_that_nothing_needs():
    _, done, counts = run()
    assert counts[False] == counts[True] == 4
    turns = [turn for t in done.trajectories for turn in t.turns]
    for r, turn in enumerate(turns):  # the others keep the engine's
        held = done.batch.old_logprobs[done.batch.response_index == r]
        torch.testing.assert_close(held, torch.tensor(turn.logprobs), atol=1e-4, rtol=0)


def test_entropies_that_no_engine_gave_are_missing_of_rows_without_a_gradient():
    blind = BlindEngine(slots=8, max_length=96, bucket=32)
    seen = SlotEngine(slots=8, max_length=96, bucket=32)
    _, done, counts = run(engine=blind)
    _, expected, _ = run(engine=seen)
    assert counts == {True: 4, False: 8}
    torch.testing.assert_close(done.batch.entropy, expected.batch.entropy, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "loss",
    [
        ClippedLoss(kl_coef=0.1),
        replace(NO_KL, entropy_coef=0.1),
        replace(NO_KL, covariance=KLCov(ratio=0.1)),
    ],
)
def test_a_row_that_a_kl_term_or_a_bonus_moves_is_left_out(loss):
    _, done, counts = run(loss=loss)
    assert counts[True] == 8
    assert done.metrics["policy/dropped_rows"] == 0.0


def test_a_trajectory_that_broke_is_computed():
    _, done, _ = run(loss=ClippedLoss(kl_coef=0.1))
    done.batch.loss_mask[3] = False
    kept = rows_with_gradient(
        done.batch, done.advantages, ClippedLoss(kl_coef=0.1), zeros_count=False
    )
    assert kept.tolist() == [row != 3 for row in range(8)]


def test_rows_of_zeros_are_left_out_where_something_adds_to_advantages():
    _, done, counts = run(modulation=EMPG())
    assert counts[True] == 8
    assert done.metrics["policy/dropped_rows"] == 0.0


def test_a_row_counts_by_the_advantages_of_its_tokens():
    _, done, _ = run()
    batch = done.batch
    tokens = torch.zeros(batch.input_ids.shape)
    tokens[5] = (batch.response_index[5] >= 0).float()
    tokens[6, batch.response_index[6] < 0] = 1.0  # prompt tokens have no loss
    kept = rows_with_gradient(batch, tokens, NO_KL, zeros_count=False)
    assert kept.nonzero().flatten().tolist() == [5]
    assert rows_with_gradient(batch, tokens, NO_KL, zeros_count=True).all()


def test_a_row_keeps_its_minibatch_whatever_else_is_active():
    settings = UpdateSettings(update_epochs=2, num_minibatches=3)
    every, some = (
        UpdatePlan.draw(active, settings, torch.Generator().manual_seed(0))
        for active in (torch.ones(8).bool(), torch.arange(8) < 3)
    )
    assert [step.rows for step in every.steps] == [step.rows for step in some.steps]
    assert all(step.rows == step.active for step in every.steps)
    assert sorted(row for rows in some.first_epoch for row in rows) == [0, 1, 2]
    assert (every.idle, some.idle) == ([], [3, 4, 5, 6, 7])
    assert len(some.steps) == 6


def test_a_parameter_without_a_gradient_is_forgotten_by_the_optimizer():
    parameter = torch.nn.Parameter(torch.ones(2))
    sum_gradients([parameter], world_size=1)
    assert parameter.grad.tolist() == [0.0, 0.0]
