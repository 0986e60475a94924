import pytest
import torch

from aem_lightning.functional import (
    clipped_surrogate,
    discounted_returns,
    gae,
    grpo_advantages,
    kl_k3,
    response_entropy,
    rloo_advantages,
    sequence_ratio,
)

ESTIMATORS = [grpo_advantages, rloo_advantages]


def random_returns(count=40, groups=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    returns = torch.randn(count, generator=generator, dtype=torch.float64)
    return returns, torch.randint(groups, (count,), generator=generator) * 7 - 3


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_nothing_or_a_group_of_one_has_no_advantage(estimator):
    assert estimator(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)
    advantages = estimator(torch.tensor([5.0, 1.0, 0.0]), torch.tensor([3, 8, 8]))
    assert advantages[0] == 0
    assert advantages[1] > 0 > advantages[2]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_returns_give_exactly_zero_whatever_their_mean_rounds_to(estimator):
    advantages = estimator(torch.full((7,), 0.1), torch.zeros(7, dtype=torch.long))
    assert torch.equal(advantages, torch.zeros(7))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_masked_trajectories_enter_no_statistic_and_get_no_advantage(estimator):
    returns, group = random_returns()
    mask = torch.rand(40, generator=torch.Generator().manual_seed(1)) < 0.7
    returns[~mask] = torch.nan
    advantages = estimator(returns, group, mask=mask)
    torch.testing.assert_close(advantages[mask], estimator(returns[mask], group[mask]))
    assert torch.equal(advantages[~mask], torch.zeros_like(advantages[~mask]))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_return_that_is_not_finite_and_shapes_that_differ_are_named(estimator):
    with pytest.raises(ValueError, match=r"\[2\]"):
        estimator(torch.tensor([0.0, 1.0, torch.nan]), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"returns \[3\], group \[2\]"):
        estimator(torch.zeros(3), torch.zeros(2, dtype=torch.long))


def test_gae_with_lambda_one_is_the_discounted_return_minus_the_value():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    values = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    advantages, returns = gae(rewards, values, 0.9, 1.0)
    torch.testing.assert_close(returns, discounted_returns(rewards, 0.9))
    torch.testing.assert_close(advantages, returns - values)


def test_gae_with_lambda_zero_is_the_one_step_error():
    rewards, values = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.25])
    advantages, _ = gae(rewards, values, 0.8, 0.0)
    torch.testing.assert_close(advantages, torch.tensor([1.0 + 0.8 * 0.25 - 0.5, 2.0 - 0.25]))


def test_returns_of_no_time_are_empty():
    assert discounted_returns(torch.zeros(0), 0.9).shape == (0,)
    assert discounted_returns(torch.zeros(3, 0), 0.9).shape == (3, 0)


def test_the_clip_mask_marks_exactly_the_elements_without_gradient():
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.randn(400, generator=generator).requires_grad_()
    advantages = torch.randn(400, generator=generator)
    loss, clipped = clipped_surrogate(
        logprobs, torch.zeros(400), advantages, clip_low=0.2, clip_high=0.28
    )
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    assert torch.equal(gradient == 0, clipped)
    ratio = logprobs.detach().exp()
    expected = ((advantages > 0) & (ratio > 1.28)) | (
        (advantages < 0) & ((ratio < 0.8) | (ratio > 3))
    )
    assert torch.equal(clipped, expected)


def test_without_the_dual_clip_a_negative_advantage_is_unbounded():
    logprobs, zero = torch.tensor([3.0]), torch.zeros(1)
    bounded, _ = clipped_surrogate(logprobs, zero, torch.tensor([-1.0]))
    free, clipped = clipped_surrogate(logprobs, zero, torch.tensor([-1.0]), dual_clip=None)
    assert bounded.item() == 3.0
    assert not clipped.any()
    assert free.item() == pytest.approx(torch.tensor(3.0).exp().item())


def test_a_huge_ratio_gives_no_nan_gradient():
    logprobs = torch.tensor([0.0, 0.0], requires_grad=True)
    loss, _ = clipped_surrogate(logprobs, torch.full((2,), -500.0), torch.tensor([1.0, -1.0]))
    loss.sum().backward()
    assert logprobs.grad.isfinite().all()


@pytest.mark.parametrize(
    "options", [{"clip_low": 1.0}, {"clip_high": -0.1}, {"dual_clip": 1.0}, {"clip_low": -0.1}]
)
def test_a_clip_out_of_range_is_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        clipped_surrogate(torch.zeros(1), torch.zeros(1), torch.zeros(1), **options)


def test_sequence_ratio_averages_over_the_tokens_of_a_response_across_rows():
    logprobs = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[-0.1, 9.0, -0.4], [-0.3, 9.0, 9.0]], dtype=torch.float64)
    index = torch.tensor([[0, -1, 1], [0, -1, -1]])
    ratio = sequence_ratio(logprobs, old, index, 3)
    torch.testing.assert_close(ratio, torch.tensor([0.2, 0.4, 0.0], dtype=torch.float64).exp())
    (gradient,) = torch.autograd.grad(ratio[0], logprobs)
    expected = ratio[0].detach() / 2 * (index == 0)
    torch.testing.assert_close(gradient, expected)


def test_kl_k3_is_zero_only_where_policies_agree_and_keeps_small_differences():
    logprobs = torch.full((3,), -2.0)
    kl = kl_k3(logprobs, torch.tensor([-2.0, -2.001, -1.0]))
    assert kl[0] == 0
    assert (kl[1:] > 0).all()
    assert kl[1].item() == pytest.approx(5e-7, rel=1e-3)


@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (clipped_surrogate, [(4, 4), (4, 4), (4,)], r"advantages \[4\]"),
        (kl_k3, [(3,), (1,)], r"ref_logprobs \[1\]"),
        (response_entropy, [(2, 3), (3, 2), 1], r"entropies \[2, 3\], response_index \[3, 2\]"),
        (gae, [(3,), (2,), 1.0, 1.0], r"rewards \[3\], values \[2\]"),
    ],
)
def test_shapes_that_would_broadcast_are_named(function, arguments, named):
    given = [torch.zeros(a) if isinstance(a, tuple) else a for a in arguments]
    with pytest.raises(ValueError, match=named):
        function(*given)
