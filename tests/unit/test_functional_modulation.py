import math

import pytest
import torch

from aem_lightning.functional import aem_coefficients, empg_gain, response_entropy, token_entropy


def random_groups(count=60, groups=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    entropy = torch.rand(count, generator=generator, dtype=torch.float64) * 2
    return entropy, torch.randint(groups, (count,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("direction", ["paper", "reversed", "shuffled"])
def test_sharpness_zero_is_exactly_one_everywhere(direction, dtype):
    entropy, group = random_groups()
    alpha = aem_coefficients(entropy.to(dtype), group, sharpness=0.0, direction=direction)
    assert alpha.dtype == dtype
    assert torch.equal(alpha, torch.ones_like(alpha))


@pytest.mark.parametrize("direction", ["paper", "reversed", "shuffled"])
def test_alpha_is_positive_bounded_and_averages_one_in_each_group(direction):
    entropy, group = random_groups()
    alpha = aem_coefficients(entropy, group, direction=direction)
    assert alpha.min() > 1 / math.e
    assert alpha.max() < math.e
    for g in group.unique():
        assert alpha[group == g].mean().item() == pytest.approx(1.0, abs=1e-12)


def test_a_group_of_one_and_a_group_under_the_gate_keep_their_advantages():
    entropy = torch.tensor([0.7, 0.30, 0.35, 0.39, 0.1, 0.9])
    group = torch.tensor([5, 2, 2, 2, 9, 9])
    alpha = aem_coefficients(entropy, group)
    assert torch.equal(alpha[:4], torch.ones(4))
    assert alpha[4] > 1 > alpha[5]


def test_the_gate_is_an_option():
    entropy, group = torch.tensor([0.30, 0.35, 0.39]), torch.zeros(3, dtype=torch.long)
    assert aem_coefficients(entropy, group, min_range=0.05)[0] > 1
    assert torch.equal(aem_coefficients(torch.full((3,), 0.3), group, min_range=0.0), torch.ones(3))


def test_masked_responses_leave_the_statistics_and_keep_their_advantages():
    entropy, group = random_groups()
    mask = torch.rand(60, generator=torch.Generator().manual_seed(1)) < 0.7
    entropy[~mask] = torch.nan
    alpha = aem_coefficients(entropy, group, mask=mask)
    assert torch.equal(alpha[~mask], torch.ones_like(alpha[~mask]))
    torch.testing.assert_close(alpha[mask], aem_coefficients(entropy[mask], group[mask]))


def test_an_empty_response_counts_as_zero_entropy_only_without_the_mask():
    index = torch.tensor([[0, 0, 1, -1, 2, 2]])
    entropies = torch.tensor([[0.2, 0.4, 0.9, 7.0, 0.5, 0.7]])
    entropy = response_entropy(entropies, index, 4)
    torch.testing.assert_close(entropy, torch.tensor([0.3, 0.9, 0.6, 0.0]))
    group, mask = torch.zeros(4, dtype=torch.long), torch.tensor([True, True, True, False])
    alpha = aem_coefficients(entropy, group, mask=mask)
    torch.testing.assert_close(alpha[:3], aem_coefficients(entropy[:3], group[:3]))
    assert alpha[3] == 1


def test_everything_masked_gives_ones():
    alpha = aem_coefficients(
        torch.full((3,), torch.nan), torch.arange(3), mask=torch.zeros(3, dtype=torch.bool)
    )
    assert torch.equal(alpha, torch.ones(3))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_entropy_is_named_by_its_response(value):
    entropy = torch.tensor([0.1, value, 0.3, value])
    with pytest.raises(ValueError, match=r"\[1, 3\]"):
        aem_coefficients(entropy, torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\[1, 3\]"):
        empg_gain(entropy)


def test_alpha_is_detached():
    entropy = torch.tensor([0.2, 0.8], requires_grad=True)
    assert not aem_coefficients(entropy, torch.zeros(2, dtype=torch.long)).requires_grad


def test_alpha_follows_a_permutation_of_the_rows():
    entropy, group = random_groups()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    alpha = aem_coefficients(entropy, group)
    torch.testing.assert_close(aem_coefficients(entropy[order], group[order]), alpha[order])


def test_shuffled_permutes_within_groups_and_among_counted_responses_only():
    entropy, group = random_groups()
    mask = torch.rand(60, generator=torch.Generator().manual_seed(1)) < 0.8
    plain = aem_coefficients(entropy, group, mask=mask)
    shuffled = aem_coefficients(
        entropy, group, mask=mask, direction="shuffled", generator=torch.Generator().manual_seed(3)
    )
    assert not torch.equal(plain, shuffled)
    for g in group.unique():
        inside = (group == g) & mask
        assert torch.equal(plain[inside].sort().values, shuffled[inside].sort().values)
    assert torch.equal(shuffled[~mask], torch.ones_like(shuffled[~mask]))
    again = aem_coefficients(
        entropy, group, mask=mask, direction="shuffled", generator=torch.Generator().manual_seed(3)
    )
    assert torch.equal(shuffled, again)


def test_shuffled_reaches_every_permutation_of_a_group():
    entropy, group = torch.tensor([0.2, 0.5, 0.8]), torch.zeros(3, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    seen = {
        tuple(aem_coefficients(entropy, group, direction="shuffled", generator=generator).tolist())
        for _ in range(100)
    }
    assert len(seen) == 6


def test_bad_options_say_what_is_allowed():
    entropy, group = random_groups()
    with pytest.raises(ValueError, match=r"'upside'.*paper.*reversed.*shuffled"):
        aem_coefficients(entropy, group, direction="upside")
    with pytest.raises(ValueError, match="min_range"):
        aem_coefficients(entropy, group, min_range=-0.1)
    with pytest.raises(ValueError, match=r"entropy \[60\], group \[59\]"):
        aem_coefficients(entropy, group[1:])


def test_an_impossible_token_does_not_make_the_entropy_nan():
    logits = torch.tensor([0.0, -torch.inf, 0.0], requires_grad=True)
    entropy = token_entropy(logits)
    assert entropy.item() == pytest.approx(math.log(2))
    (gradient,) = torch.autograd.grad(entropy, logits)
    assert gradient.isfinite().all()


def test_token_entropy_of_half_precision_is_summed_in_float32():
    logits = torch.randn(4, 50_000, generator=torch.Generator().manual_seed(0))
    half = token_entropy(logits.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(
        half, token_entropy(logits.bfloat16().double()).float(), rtol=1e-5, atol=0
    )


def test_reversed_swaps_which_end_is_favoured():
    entropy, group = torch.tensor([0.2, 0.8]), torch.zeros(2, dtype=torch.long)
    paper = aem_coefficients(entropy, group)
    torch.testing.assert_close(
        aem_coefficients(entropy, group, direction="reversed"), paper.flip(0)
    )
