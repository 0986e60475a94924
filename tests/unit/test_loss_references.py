"""The losses of the field against plain float64 arithmetic that shares no code with them."""

import math
from dataclasses import replace

import hydra
import pytest
import torch
from runs import CONFIGS, composed

from aem_lightning.algorithms import ClippedLoss, TokenColumns
from aem_lightning.functional import aggregation_weights

LENGTHS = [3, 1, 4, 2]
LOSSES = sorted({path.stem for path in (CONFIGS / "loss").glob("*.yaml")} - {"custom"})


def configured(name):
    cfg = composed([f"loss={name}", "max_new_tokens=7", "paths.output_dir=."])
    return hydra.utils.instantiate(cfg.loss, _convert_="all")


def tokens(spread=0.4, seed=0):
    """Log-probabilities, old ones, advantages (equal within a response) and columns, float64."""
    generator = torch.Generator().manual_seed(seed)
    responses = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    lengths = torch.tensor(LENGTHS)[responses]
    logprobs = -1 - torch.rand(len(responses), generator=generator, dtype=torch.float64)
    noise = torch.randn(len(responses), generator=generator, dtype=torch.float64)
    advantages = torch.tensor([1.3, -0.7, 0.4, -1.1], dtype=torch.float64)[responses]
    return logprobs, logprobs - spread * noise, advantages, TokenColumns(responses, lengths)


def units(loss):
    return sum(LENGTHS) if loss.aggregation == "token" else len(LENGTHS)


def computed(loss, logprobs, old, advantages, columns):
    entropies = torch.zeros_like(logprobs)
    return loss(logprobs, old, None, entropies, advantages, columns).loss / units(loss)


def clip(ratio, advantage, low, high, dual):
    found = max(-ratio * advantage, -min(max(ratio, 1 - low), 1 + high) * advantage)
    return min(found, -dual * advantage) if dual and advantage < 0 else found


def dapo(log_ratios, advantages):
    terms = [
        clip(math.exp(d), a, 0.2, 0.28, 3.0)
        for response, a in zip(log_ratios, advantages, strict=True)
        for d in response
    ]
    return sum(terms) / len(terms)


def drgrpo(log_ratios, advantages):
    sums = [
        sum(clip(math.exp(d), a, 0.2, 0.2, 3.0) for d in response) / 7
        for response, a in zip(log_ratios, advantages, strict=True)
    ]
    return sum(sums) / len(sums)


def gspo(log_ratios, advantages):
    terms = [
        clip(math.exp(sum(response) / len(response)), a, 3e-4, 4e-4, None)
        for response, a in zip(log_ratios, advantages, strict=True)
    ]
    return sum(terms) / len(terms)


def reference(rule, logprobs, old, advantages):
    ends = [sum(LENGTHS[: i + 1]) for i in range(len(LENGTHS))]
    spans = [(end - length, end) for end, length in zip(ends, LENGTHS, strict=True)]
    differences = [a - b for a, b in zip(logprobs.tolist(), old.tolist(), strict=True)]
    return rule([differences[a:b] for a, b in spans], [advantages.tolist()[a] for a, _ in spans])


@pytest.mark.parametrize("rule", [dapo, drgrpo, gspo])
@pytest.mark.parametrize("spread", [2e-4, 0.4])
def test_a_loss_differs_from_its_definition_in_float64(rule, spread):
    logprobs, old, advantages, columns = tokens(spread)
    found = computed(configured(rule.__name__), logprobs, old, advantages, columns)
    expected = reference(rule, logprobs, old, advantages)
    assert found.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rule", [dapo, drgrpo, gspo])
@pytest.mark.parametrize("spread", [2e-4, 0.4])
def test_the_gradient_differs_from_differences_of_the_definition(rule, spread):
    logprobs, old, advantages, columns = tokens(spread)
    logprobs.requires_grad_()
    loss = computed(configured(rule.__name__), logprobs, old, advantages, columns)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    step = 1e-8
    for t in range(len(old)):
        moved = torch.zeros_like(old)
        moved[t] = step
        ahead = reference(rule, logprobs.detach() + moved, old, advantages)
        behind = reference(rule, logprobs.detach() - moved, old, advantages)
        assert gradient[t].item() == pytest.approx((ahead - behind) / (2 * step), abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_the_first_step_is_not_the_plain_policy_gradient(name):
    logprobs, _, advantages, columns = tokens()
    logprobs.requires_grad_()
    sampled = replace(columns, sampler_logprobs=logprobs.detach())
    loss = replace(configured(name), kl_coef=0.0, entropy_coef=0.0)
    if name == "kl_cov":  # the only one that treats tokens and keeps their gradient
        sampled = replace(sampled, chosen=torch.arange(len(logprobs)) % 2 == 0)
    found = computed(loss, logprobs, logprobs.detach(), advantages, sampled)
    (gradient,) = torch.autograd.grad(found, logprobs)
    weight = {
        "token": torch.ones(len(logprobs)) / sum(LENGTHS),
        "sequence": 1 / columns.lengths / len(LENGTHS),
        "constant": torch.ones(len(logprobs)) / 7 / len(LENGTHS),
    }[loss.aggregation]
    torch.testing.assert_close(gradient, -weight * advantages, rtol=1e-6, atol=0, check_dtype=False)


def test_clip_cov_keeps_the_gradient_of_a_chosen_token():
    logprobs, _, advantages, columns = tokens()
    logprobs.requires_grad_()
    chosen = torch.arange(len(logprobs)) == 4
    found = computed(
        replace(configured("clip_cov"), kl_coef=0.0),
        logprobs,
        logprobs.detach(),
        advantages,
        replace(columns, chosen=chosen),
    )
    (gradient,) = torch.autograd.grad(found, logprobs)
    assert torch.equal(gradient == 0, chosen)


def test_kl_cov_does_not_hold_a_chosen_token_back():
    logprobs, old, advantages, columns = tokens()
    logprobs.requires_grad_()
    loss = replace(configured("kl_cov"), kl_coef=0.0, clip_low=0.99, clip_high=1e9, dual_clip=None)
    chosen = torch.arange(len(logprobs)) == 4
    plain = computed(replace(loss, covariance=None), logprobs, old, advantages, columns)
    held = computed(loss, logprobs, old, advantages, replace(columns, chosen=chosen))
    (difference,) = torch.autograd.grad(held - plain, logprobs)
    expected = torch.where(chosen, (logprobs - old).sign(), 0.0) / sum(LENGTHS)
    torch.testing.assert_close(difference, expected)


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights_do_not_scale_the_gradient_as_defined(level, mode):
    logprobs, old, advantages, columns = tokens()
    logprobs.requires_grad_()
    correction = configured("truncated_is").correction
    correction = replace(correction, level=level, mode=mode, limit=1.3)
    loss = replace(configured("truncated_is"), kl_coef=0.0, correction=correction)
    sampled = replace(columns, sampler_logprobs=old)  # the ratio is 1: the sampler differs alone
    found = computed(loss, logprobs, logprobs.detach(), advantages, sampled)
    (gradient,) = torch.autograd.grad(found, logprobs)
    logs = (logprobs.detach() - old).tolist()
    for t, r in enumerate(columns.responses.tolist()):
        same = [u for u, other in enumerate(columns.responses.tolist()) if other == r]
        weight = math.exp(sum(logs[u] for u in same) if level == "sequence" else logs[t])
        if mode == "truncate":
            weight = min(weight, 1.3)
        elif not 1 / 1.3 <= weight <= 1.3:
            weight = 0.0
        expected = -weight * advantages[t].item() / sum(LENGTHS)
        assert gradient[t].item() == pytest.approx(expected, rel=1e-9)


def test_the_mismatch_with_the_sampler_is_not_logged_without_a_correction():
    logprobs, old, advantages, columns = tokens()
    sampled = replace(columns, sampler_logprobs=old)
    stats = ClippedLoss()(logprobs, logprobs, None, 0 * old, advantages, sampled).stats
    torch.testing.assert_close(stats["sampler_gap"], (logprobs - old).abs().sum())
    assert stats["sampler_kl"] > 0
    assert "correction" not in stats


def test_losses_over_responses_do_without_knowing_them():
    logprobs, old, advantages, _ = tokens()
    for settings in ({"ratio": "sequence"}, {"aggregation": "sequence"}):
        with pytest.raises(ValueError, match="need columns"):
            ClippedLoss(**settings)(logprobs, old, None, 0 * old, advantages)


@pytest.mark.parametrize(
    "settings",
    [{"ratio": "word"}, {"aggregation": "median"}, {"aggregation": "constant"}],
)
def test_a_wrong_choice_of_the_loss_says_nothing_of_what_is_allowed(settings):
    with pytest.raises(ValueError, match=r"loss\.(ratio|aggregation|constant)=.* type "):
        ClippedLoss(**settings)
    with pytest.raises(ValueError, match="choose one of"):
        aggregation_weights(torch.ones(2), "median")
