"""Functions of the field's estimators and entropy baselines."""

import math

import pytest
import torch

from aem_lightning.algorithms import AdaptiveEntropy
from aem_lightning.functional import (
    clip_cov_tokens,
    clipped_value_loss,
    discounted_returns,
    empg_bonus,
    gae,
    importance_weights,
    kl_cov_tokens,
    overlong_penalty,
    step_returns,
    token_covariances,
    token_gae,
    whiten,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_step_returns_look_into_another_trajectory_or_depend_on_the_order():
    rewards = random(7)
    trajectory, turn = torch.tensor([1, 0, 1, 0, 1, 2, 0]), torch.tensor([2, 0, 0, 2, 1, 0, 1])
    found = step_returns(rewards, trajectory, turn, 0.9)
    for n in range(3):
        mine = (trajectory == n).nonzero()[:, 0]
        mine = mine[turn[mine].argsort()]
        torch.testing.assert_close(found[mine], discounted_returns(rewards[mine], 0.9))
    assert step_returns(torch.zeros(0), *2 * [torch.zeros(0, dtype=torch.long)], 0.9).shape == (0,)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.97, 0.9), (0.9, 0.0)])
def test_token_gae_is_not_gae_over_the_tokens_of_a_trajectory(gamma, lam):
    # Trajectory 0: responses 0 and 1, of two rows; trajectory 1: 2 (a single token) and 3.
    index = torch.tensor([[-1, 0, 0, -1, -1], [-1, 1, 1, 1, -1], [-1, 2, -1, 3, 3]])
    trajectory, rewards, values = torch.tensor([0, 0, 1, 1]), random(4), random(3, 5, seed=1)
    advantages, returns = token_gae(rewards, values, index, trajectory, gamma, lam)
    assert torch.equal(advantages == 0, index < 0)
    r, zero = rewards.tolist(), 0.0
    for places, paid in (
        ([(0, 1), (0, 2), (1, 1), (1, 2), (1, 3)], [zero, r[0], zero, zero, r[1]]),
        ([(2, 1), (2, 3), (2, 4)], [r[2], zero, r[3]]),
    ):
        rows, columns = (list(part) for part in zip(*places, strict=True))
        known = torch.tensor(paid, dtype=torch.float64)
        expected = gae(known, values[rows, columns], gamma, lam)
        torch.testing.assert_close(advantages[rows, columns], expected[0])
        torch.testing.assert_close(returns[rows, columns], expected[1])
    order = [2, 0, 1]  # of the rows: time is told by the numbers of the responses
    again, _ = token_gae(rewards, values[order], index[order], trajectory, gamma, lam)
    torch.testing.assert_close(again, advantages[order])


def test_whitened_values_have_another_mean_or_spread():
    values, mask = random(50) * 3 + 7, torch.arange(50) % 3 > 0
    white = whiten(values, mask=mask, eps=0.0)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-12)
    assert white[mask].std().item() == pytest.approx(1)
    assert not white[~mask].any()
    assert not whiten(torch.full((4,), 0.1)).any()


def test_the_overlong_penalty_is_not_0_then_linear_to_minus_1():
    lengths = torch.arange(0, 121)
    penalty = overlong_penalty(lengths, 100, 25)
    assert not penalty[:76].any()
    torch.testing.assert_close(penalty[75:101], torch.linspace(0, -1, 26))
    assert (penalty[101:] == -1).all()
    with pytest.raises(ValueError, match="cache=0"):
        overlong_penalty(lengths, 100, 0)


def test_the_value_loss_follows_a_value_that_moved_past_its_clip():
    values = torch.tensor([0.1, 0.9, -0.9], requires_grad=True)
    loss = clipped_value_loss(values, torch.zeros(3), torch.tensor([2.0, 2.0, 2.0]), clip=0.5)
    torch.testing.assert_close(loss, 0.5 * torch.tensor([1.9, 1.5, 2.9]).square())
    loss.sum().backward()
    assert (values.grad == 0).tolist() == [False, True, False]
    with pytest.raises(ValueError, match="clip=0"):
        clipped_value_loss(values, values, values, clip=0)


def test_covariances_add_up_to_the_covariance_and_leave_others_out():
    logprobs, advantages = -random(60).abs(), random(60, seed=1)
    mask = torch.arange(60) % 4 > 0
    found = token_covariances(logprobs, advantages, mask=mask)
    table = torch.stack([logprobs[mask], advantages[mask]])
    assert found[mask].mean().item() == pytest.approx(torch.cov(table, correction=0)[0, 1].item())
    assert (found[~mask] == -math.inf).all()


def test_clip_cov_chooses_outside_its_bounds_or_too_many():
    covariances = torch.cat([torch.full((50,), 0.5), torch.full((50,), 2.0), torch.tensor([9.0])])
    chosen = clip_cov_tokens(covariances, ratio=0.1, generator=torch.Generator().manual_seed(0))
    assert chosen.sum() == 10
    assert chosen[50:100].sum() == 10
    other = clip_cov_tokens(covariances, ratio=0.1, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(chosen, other)
    assert not clip_cov_tokens(torch.full((5,), 0.5), ratio=0.5).any()
    assert not clip_cov_tokens(covariances, ratio=0.0).any()


def test_kl_cov_chooses_others_than_the_highest():
    covariances = torch.tensor([1.0, -math.inf, 5.0, 3.0, -2.0])
    assert kl_cov_tokens(covariances, ratio=0.5).tolist() == [False, False, True, True, False]
    assert kl_cov_tokens(covariances, ratio=1.0).tolist() == [True, False, True, True, True]
    assert not kl_cov_tokens(torch.full((3,), -math.inf), ratio=1.0).any()
    with pytest.raises(ValueError, match=r"ratio=1\.5"):
        kl_cov_tokens(covariances, ratio=1.5)


def test_importance_weights_of_a_long_response_overflow():
    sampler = torch.full((2000,), -1.0)
    responses = torch.zeros(2000, dtype=torch.long)
    for mode, expected in (("truncate", 2.0), ("mask", 0.0)):
        weights = importance_weights(0 * sampler, sampler, responses, level="sequence", mode=mode)
        assert (weights == expected).all()
    with pytest.raises(ValueError, match="level='word'"):
        importance_weights(sampler, sampler, responses, level="word")
    with pytest.raises(ValueError, match=r"limit=0\.5"):
        importance_weights(sampler, sampler, responses, limit=0.5)


def test_the_entropy_coefficient_leaves_its_bounds_or_goes_the_wrong_way():
    rule = AdaptiveEntropy(target=0.3, step=0.04, maximum=0.1)
    coef, seen = 0.0, []
    for entropy in (0.1, 0.1, 0.1, 0.5, 0.5, 0.5, 0.5):
        coef = rule.after(coef, entropy)
        seen.append(coef)
    assert seen == pytest.approx([0.04, 0.08, 0.1, 0.06, 0.02, 0.0, 0.0])


def test_empg_gives_a_last_response_a_bonus_or_takes_it_from_another_trajectory():
    entropy = torch.tensor([0.8, 0.2, 0.5, 0.5, 9.0])
    trajectory, turn = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 1, 1, 0, 2])
    mask = torch.tensor([True, True, True, True, False])
    bonus = empg_bonus(entropy, trajectory, turn, mask=mask)
    half = math.exp(-0.5)
    torch.testing.assert_close(bonus, torch.tensor([1.0, 0.0, 0.0, half, 0.0]))
    assert not empg_bonus(entropy, trajectory, turn, mask=torch.zeros_like(mask)).any()
