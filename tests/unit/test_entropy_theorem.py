"""The drift theorem on a policy that is a table, by the inverse of its Fisher matrix."""

import pytest
import torch

from aem_lightning.functional import aem_coefficients, entropy_drift

STEP = 1e-5


def entropy(logits):
    logprobs = torch.log_softmax(logits, 0)
    return -(logprobs.exp() * logprobs).sum()


def natural_direction(logits, advantages, weights):
    """The natural gradient of sum_i w_i A_i log p_i, by the inverse of the Fisher matrix."""
    p = torch.softmax(logits, 0)
    fisher = torch.diag(p) - torch.outer(p, p)
    gradient = weights * advantages - (weights * advantages).sum() * p
    return torch.linalg.pinv(fisher, hermitian=True) @ gradient


def measured_drift(logits, advantages, weights):
    """The change of entropy a step, by central differences of the entropy itself."""
    direction = natural_direction(logits, advantages, weights)
    ahead, behind = entropy(logits + STEP * direction), entropy(logits - STEP * direction)
    return ((ahead - behind) / (2 * STEP)).item()


@pytest.mark.parametrize("seed", range(5))
def test_the_measured_entropy_change_is_not_the_advantage_times_the_relative_surprisal(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(9, generator=generator, dtype=torch.float64)
    advantage = torch.randn((), generator=generator, dtype=torch.float64)
    for action in range(9):
        alone = torch.zeros(9, dtype=torch.float64)
        alone[action] = 1.0
        surprisal = -torch.log_softmax(logits, 0)[action]
        expected = entropy_drift(advantage, surprisal, entropy(logits)).item()
        found = measured_drift(logits, advantage.expand(9), alone)
        assert found == pytest.approx(expected, abs=1e-6)


def two_token_responses(seed, first=6, second=5):
    """Logits of all responses of two tokens, their mean token entropy and their first token.

    First tokens are equally likely; what follows some of them is all but certain, what follows
    others is open.
    """
    generator = torch.Generator().manual_seed(seed)
    sharpness = torch.linspace(0.2, 4.0, first, dtype=torch.float64)[:, None]
    table = sharpness * torch.randn(first, second, generator=generator, dtype=torch.float64)
    logprobs = torch.log_softmax(table, 1)
    follows = -(logprobs.exp() * logprobs).sum(1)
    start = torch.log(torch.tensor(float(first), dtype=torch.float64))
    mean_entropy = ((start + follows) / 2)[:, None].expand(first, second).reshape(-1)
    return (logprobs - start).reshape(-1), mean_entropy


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_drift_that_modulation_adds_has_not_the_predicted_sign(seed, sign):
    logits, mean_entropy = two_token_responses(seed)
    p, group = logits.exp(), torch.zeros(len(logits), dtype=torch.long)
    # Every response as often as the policy gives it: repeated by their expected numbers.
    alpha = aem_coefficients(mean_entropy, group, weight=p)
    advantages = torch.full_like(p, sign)
    added = measured_drift(logits, alpha * advantages, p) - measured_drift(logits, advantages, p)
    predicted = (p * entropy_drift((alpha - 1) * advantages, -logits, entropy(logits))).sum()
    assert added == pytest.approx(predicted.item(), abs=1e-6)
    assert added * sign < 0  # rewarded certainty closes the policy, punished certainty opens it


def test_reversed_modulation_adds_the_same_drift():
    logits, mean_entropy = two_token_responses(0)
    p, group = logits.exp(), torch.zeros(len(logits), dtype=torch.long)
    alpha = aem_coefficients(mean_entropy, group, weight=p, direction="reversed")
    ones = torch.ones_like(p)
    assert measured_drift(logits, alpha, p) > measured_drift(logits, ones, p)
