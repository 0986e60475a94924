"""The self-check: what it finds, what it leaves alone, and what it says."""

import time
from dataclasses import asdict

import pytest
import torch
from models.families import build
from tiny_play import make_policy, word_tokenizer

from aem_lightning.modules import Lora, Policy, attention, self_check
from aem_lightning.rollout import SlotEngine, slot_model

WINDOWED = ("Mistral", "Phi-3", "Starcoder2", "Gemma 3", "Llama 4")


def policy_of(name):
    return Policy(build(name), word_tokenizer(), Lora(r=2, alpha=4))


def make_engine():
    return SlotEngine(slots=2, max_length=60, bucket=16)


@pytest.mark.parametrize("name", ["Qwen2", "Phi", "Cohere", *WINDOWED])
def test_a_family_that_is_right_has_gaps_or_was_not_checked_in_all_ways(name):
    gaps = self_check.self_check(policy_of(name), make_engine())
    assert gaps.allowed == 1e-3
    assert gaps.tokens > 24 if name in WINDOWED else gaps.tokens == 24
    for way in ("padded", "packed", "engine"):
        assert getattr(gaps, way) < 1e-5
        assert f"{way} " in str(gaps)


def test_the_check_leaves_traces_or_takes_over_two_seconds():
    policy, engine = make_policy(awake=True).train(), make_engine()
    state = torch.get_rng_state()
    start = time.process_time()
    self_check.self_check(policy, engine)
    assert time.process_time() - start < 2
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(engine.stats.values())
    assert all(module.training for module in policy.modules())
    assert all(parameter.grad is None for parameter in policy.parameters())


def without_scale(monkeypatch, policy):
    """As it was once: hidden states times the head's weight."""
    weight = policy.causal_lm.lm_head.weight
    monkeypatch.setattr(type(policy.head), "weight", weight)


def without_window(monkeypatch, policy):
    rule = slot_model.SlotModel.mask
    monkeypatch.setattr(
        slot_model.SlotModel, "mask", lambda self, p, r, sees: rule(self, p, r, None)
    )
    slot_model.TRIED.add(policy.causal_lm)  # as where its window is too long to try


def without_segments(monkeypatch, policy):
    monkeypatch.setattr(attention, "_trial", lambda model: None)


@pytest.mark.parametrize(
    ("name", "fault", "told"),
    [
        ("Granite", without_scale, r"in padded rows.*GraniteForCausalLM.*policy\.model="),
        ("Mistral", without_window, r"as the engine samples.*MistralForCausalLM.*engine=auto"),
        ("Nemotron", without_segments, r"in packed rows.*NemotronForCausalLM.*packing=padded"),
    ],
)
def test_a_run_begins_with_log_probabilities_of_another_model(monkeypatch, name, fault, told):
    policy = policy_of(name)
    fault(monkeypatch, policy)
    with pytest.raises(ValueError, match=rf"self-check: {told}") as error:
        self_check.self_check(policy, make_engine())
    assert "nats off" in str(error.value)
    assert "0.001 is allowed in float32" in str(error.value)


def test_an_engine_that_lies_about_its_tokens_is_believed():
    class Liar(SlotEngine):
        def poll(self, wait_all=False, at_least=1):
            results = super().poll(wait_all, at_least)
            for result in results:
                result.entropies[-1] += 0.01
            return results

    with pytest.raises(ValueError, match=r"0\.01 nats off"):
        self_check.self_check(make_policy(), Liar(slots=2, max_length=60))


def test_half_precision_is_held_to_the_bound_of_full_precision():
    policy = policy_of("Gemma 3")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gaps = self_check.self_check(policy, make_engine())
    assert gaps.allowed == 0.1
    assert 1e-5 < max(gaps.padded, gaps.engine) < 0.1  # which of them hangs on the processor
    gaps = self_check.self_check(Policy(build("Phi").bfloat16(), word_tokenizer()), make_engine())
    assert max(v for k, v in asdict(gaps).items() if k in ("padded", "packed", "engine")) < 0.1


def test_a_model_that_is_not_finite_is_named_by_its_gap():
    policy = policy_of("Qwen2")
    with torch.no_grad():
        policy.causal_lm.lm_head.weight[3] = torch.nan
    assert self_check.self_check(policy, make_engine()) is None


def test_a_refused_model_is_checked_without_an_engine_only():
    policy = policy_of("Gemma 2")
    gaps = self_check.self_check(policy)
    assert gaps.padded < 1e-5
    assert gaps.packed is gaps.engine is None
    with pytest.raises(ValueError, match="engine=auto"):
        self_check.self_check(policy, make_engine())
