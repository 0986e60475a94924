import pytest
import torch

from aem_lightning.algorithms import AEM, GRPO, ClippedLoss, NoModulation
from aem_lightning.functional import aem_coefficients, grpo_advantages, kl_k3
from aem_lightning.rollout import pack
from aem_lightning.types import Task, Trajectory, Turn


def make_batch(entropies, returns, copies=2, broken=()):
    """One trajectory for each list of response entropies; ``copies`` make a group."""
    trajectories = []
    for n, (values, total) in enumerate(zip(entropies, returns, strict=True)):
        turns = [Turn("o", (), "r", "a", i, 1, [-1.0], [value]) for i, value in enumerate(values)]
        turns[-1].reward = total
        trajectory = Trajectory(Task("t"), n // copies, n % copies, turns, [[1, 2]] * len(values))
        trajectory.infra_error = "died" if n in broken else None
        trajectories.append(trajectory)
    return pack(trajectories)


def test_grpo_gives_every_response_the_advantage_of_its_trajectory():
    batch = make_batch([[0.1, 0.2, 0.3], [0.4]], [1.0, 0.0])
    advantages = GRPO()(batch)
    expected = grpo_advantages(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
    assert torch.equal(advantages, expected[[0, 0, 0, 1]])


def test_a_broken_trajectory_is_out_of_the_group_statistics():
    batch = make_batch([[0.1], [0.2], [0.3]], [1.0, 0.0, 100.0], copies=3, broken=[2])
    advantages = GRPO(normalize_std=False)(batch)
    assert advantages.tolist() == [0.5, -0.5, 0.0]


def test_aem_scales_the_responses_of_a_group_by_their_entropy():
    batch = make_batch([[0.2, 0.5], [0.8], [1.0], [3.0]], [1.0, 0.0, 1.0, 0.0])
    modulated = AEM(sharpness=1.5)(batch)
    group = torch.tensor([0, 0, 0, 1, 1])
    expected = aem_coefficients(torch.tensor([0.2, 0.5, 0.8, 1.0, 3.0]), group, sharpness=1.5)
    torch.testing.assert_close(modulated.alpha, expected)
    assert modulated.gated == 0.0


def test_a_group_with_too_small_a_range_is_gated_and_counted():
    batch = make_batch([[0.20], [0.25], [1.0], [3.0]], [1.0, 0.0, 1.0, 0.0])
    modulated = AEM(min_range=0.1)(batch)
    assert modulated.gated == 0.5
    assert modulated.alpha[:2].tolist() == [1.0, 1.0]
    assert modulated.alpha[2] > 1 > modulated.alpha[3]


@pytest.mark.parametrize("broken", [[1], [0, 1]])
def test_a_broken_trajectory_neither_opens_a_gate_nor_gets_a_coefficient(broken):
    batch = make_batch([[0.20], [9.0]], [1.0, 0.0], broken=broken)
    modulated = AEM()(batch)
    assert modulated.gated == 1.0
    assert modulated.alpha.tolist() == [1.0, 1.0]


def test_no_modulation_is_exactly_one():
    modulated = NoModulation()(make_batch([[0.2], [9.0]], [1.0, 0.0]))
    assert modulated.alpha.tolist() == [1.0, 1.0]
    assert modulated.gated == 1.0


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"min_range": -0.1}, "modulation.min_range"),
        ({"direction": "upwards"}, "modulation.direction"),
        ({"sharpness": float("nan")}, "modulation.sharpness"),
    ],
)
def test_aem_refuses_wrong_settings_before_a_run_starts(settings, name):
    with pytest.raises(ValueError, match=name):
        AEM(**settings)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"clip_low": 1.0}, ["loss.clip_low=1.0"]),
        ({"clip_low": -0.1}, ["loss.clip_low=-0.1"]),
        ({"dual_clip": 0.0}, ["loss.dual_clip=0.0"]),
        ({"dual_clip": 1.0}, ["loss.dual_clip=1.0"]),
        ({"clip_high": -1.0, "kl_coef": -1.0}, ["loss.clip_high=-1.0", "loss.kl_coef=-1.0"]),
    ],
)
def test_the_loss_names_every_wrong_setting_at_once(settings, names):
    with pytest.raises(ValueError, match="type a number") as error:
        ClippedLoss(**settings)
    assert all(name in str(error.value) for name in names)


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(12, generator=generator)
    old = (logprobs + 0.4 * torch.randn(12, generator=generator)).clamp(max=0)
    reference = -torch.rand(12, generator=generator)
    entropies = torch.rand(12, generator=generator)
    advantages = torch.randn(12, generator=generator)
    return logprobs.requires_grad_(), old, reference, entropies.requires_grad_(), advantages


def test_the_kl_term_and_the_entropy_bonus_are_added_with_their_coefficients(tokens):
    logprobs, old, reference, entropies, advantages = tokens
    bare = ClippedLoss(kl_coef=0.0)(*tokens).loss
    kl = kl_k3(logprobs, reference).sum()
    both = ClippedLoss(kl_coef=0.5, entropy_coef=0.25)(*tokens)
    torch.testing.assert_close(both.loss, bare + 0.5 * kl - 0.25 * entropies.sum())
    torch.testing.assert_close(both.stats["ref_kl"], kl.detach())
    without = ClippedLoss(kl_coef=0.5)(logprobs, old, None, entropies, advantages)
    torch.testing.assert_close(without.loss, bare)
    assert "ref_kl" not in without.stats


def test_the_stats_are_detached_sums(tokens):
    logprobs, old, *_, entropies, _ = tokens
    stats = ClippedLoss()(*tokens).stats
    assert not any(value.requires_grad for value in stats.values())
    torch.testing.assert_close(stats["entropy"], entropies.detach().sum())
    ratio = (logprobs - old).detach()
    torch.testing.assert_close(stats["approx_kl"], (ratio.exp() - 1 - ratio).sum())
