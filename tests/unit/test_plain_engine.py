"""engine=plain and engine=auto: any causal LM over transformers' own caches, or over slots."""

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models.families import FAMILIES, build, own_logprobs
from test_slot_engine import make_model, request, run, tokens

from aem_lightning.modules.attention import use_packed_attention
from aem_lightning.rollout import NotFiniteError, SlotEngine
from aem_lightning.rollout.plain_model import PlainModel
from aem_lightning.rollout.slot_model import SlotModel

# Beside those of `models.families`: a state without keys, one inside the layers, no cache at all.
MORE = {
    "Mamba 2": ("Mamba2", {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1}),
    "RecurrentGemma": ("RecurrentGemma", {"lru_width": 32, "attention_window_size": 5}),
    "GPT": ("OpenAIGPT", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "RWKV": ("Rwkv", {"attention_hidden_size": 32, "context_length": 64}),
    # A scan's steps are no shorter than this; transformers forgets it where a token is fed alone.
    "Nemotron-H": ("NemotronH", {**FAMILIES["Nemotron-H"][1], "time_step_min": 1e-9}),
}
OVER_SLOTS = {"Llama", "Qwen3 MoE"}
OVER_CACHES = {
    *("Qwen3-Next", "Qwen3.5", "Granite 4", "Bamba", "Falcon H1", "Jamba", "Mamba", "LFM2"),
    *("gpt-oss", "Gemma 2", *MORE),
}
EITHER = {
    *("Mistral", "Mixtral", "Phi-3", "Gemma 3", "Gemma 4", "Cohere 2", "OLMo 3", "EXAONE 4"),
    *("DeepSeek V3", "Llama 4", "Bloom", "MPT", "GPT-2", "OPT"),
}


@functools.cache
def policy_of(name: str) -> SimpleNamespace:
    with pytest.MonkeyPatch.context() as patch:
        for more, family in MORE.items():
            patch.setitem(FAMILIES, more, family)
        return SimpleNamespace(causal_lm=build(name))


def engine_of(policy: Any, cache: Any = "plain", slots: int = 4) -> SlotEngine:
    engine = SlotEngine(slots, max_length=64, bucket=8, cache=cache)
    engine.sync(policy, 1)
    return engine


def of(model: torch.nn.Module, count: int, seed: int) -> list[int]:
    return [token % model.config.vocab_size for token in tokens(count, seed)]


def gap(model: torch.nn.Module, prompt: list[int], result: Any) -> float:
    ids = torch.tensor([[*prompt, *result.tokens]])
    own = own_logprobs(model, ids)[0, len(prompt) - 1 :]
    return float((own - torch.tensor(result.logprobs)).abs().max())


@pytest.mark.parametrize("name", sorted(OVER_SLOTS | OVER_CACHES | EITHER))
def test_a_family_is_sampled_with_other_logprobs_than_its_own(
    name: str, caplog: pytest.LogCaptureFixture
):
    policy = policy_of(name)
    model = policy.causal_lm
    engine = engine_of(policy, "auto")
    if name not in EITHER:
        kind = SlotModel if name in OVER_SLOTS else PlainModel
        assert type(engine._model) is kind
        assert ("engine=auto" in caplog.text) == (kind is PlainModel)
    prompts = {"grows": of(model, 9, 0), "turns": of(model, 12, 1), "copy": of(model, 9, 0)}
    for turn in range(2):
        results = run(engine, *(request(k, p, 5 + turn, seed=turn) for k, p in prompts.items()))
        assert turn or results["grows"].tokens == results["copy"].tokens
        for key, result in results.items():
            assert gap(model, prompts[key], result) < 1e-4
        grown = [*prompts["grows"], *results["grows"].tokens, *of(model, 4, 2)]
        prompts = {"grows": grown, "turns": [*prompts["turns"][:7], *of(model, 8, 3)]}


@pytest.mark.parametrize("wait_all", [True, False])
def test_equal_seeds_give_other_tokens_over_another_cache(wait_all: bool):
    policy, found = SimpleNamespace(causal_lm=make_model()), {}
    use_packed_attention(policy.causal_lm)  # as an update leaves it
    for cache in ("slots", "plain", "auto"):
        engine = engine_of(policy, cache, slots=3)
        prompts = {str(n): tokens(8 + 3 * (n % 3), n % 3) for n in range(5)}
        found[cache] = []
        for turn in range(2):
            engine.submit(request(k, p, 4 + int(k), seed=turn) for k, p in prompts.items())
            while results := engine.poll(wait_all):
                for result in results:
                    found[cache].append(result)
                    prompts[result.key] = [*prompts[result.key], *result.tokens, 9]
        assert engine.stats["evicted"] > 0
    assert found["auto"] == found["slots"]
    for ours, theirs in zip(found["slots"], found["plain"], strict=True):
        assert (ours.key, ours.tokens, ours.reused) == (theirs.key, theirs.tokens, theirs.reused)
        close = functools.partial(torch.testing.assert_close, atol=1e-5, rtol=0)
        close(torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs))
        close(torch.tensor(ours.entropies), torch.tensor(theirs.entropies))
    assert policy.causal_lm.training


def test_a_recurrent_state_goes_back_or_is_computed_for_every_copy():
    policy = policy_of("Qwen3.5")
    engine, prompt = engine_of(policy), of(policy.causal_lm, 20, 1)
    first = run(engine, *(request(str(n), prompt, 6, seed=n) for n in range(3)))
    assert (engine.stats["prefilled"], engine.stats["forked"]) == (20, 40)
    grown, cut = [*prompt, *first["0"].tokens, 9], [*prompt[:15], 9]
    second = run(engine, request("0", grown), request("1", cut), request("2", prompt, seed=2))
    assert [second[key].reused for key in "012"] == [25, 0, 0]
    assert second["2"].tokens[:6] == first["2"].tokens


def test_a_late_request_changes_those_under_way():
    policy = policy_of("Granite 4")
    prompts = {key: of(policy.causal_lm, 5 + n, n) for n, key in enumerate("abc")}
    engine = engine_of(policy)
    engine.submit([request("a", prompts["a"], 3), request("b", prompts["b"], 14)])
    early = engine.poll()
    engine.submit([request("c", prompts["c"], 5)])
    for result in [*early, *engine.poll(wait_all=True)]:
        assert gap(policy.causal_lm, prompts[result.key], result) < 1e-5


@pytest.mark.parametrize("name", ["Qwen3.5", "Gemma 2", "GPT"])
def test_a_stored_state_goes_on_with_other_bits(name: str, tmp_path: Path):
    policy = policy_of(name)
    prompts = {str(n): of(policy.causal_lm, 6 + 3 * n, n) for n in range(3)}
    one = engine_of(policy)
    for result in run(one, *(request(k, p, 4 + int(k)) for k, p in prompts.items())).values():
        prompts[result.key] = [*prompts[result.key], *result.tokens, 7]
    assert one.state_dict(most=10) is None
    torch.save(one.state_dict(most=1 << 20), tmp_path / "state")
    other = engine_of(policy)
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    again = [request(k, p, 6, seed=5) for k, p in prompts.items()]
    expected = run(one, *again)
    assert run(other, *again) == expected
    assert all(result.reused > 0 for result in expected.values())


def test_a_model_is_measured_at_every_sync(monkeypatch: pytest.MonkeyPatch, caplog: Any):
    engine = engine_of(policy_of("Gemma 2"), "auto")
    monkeypatch.delattr(PlainModel, "_measure")
    engine.sync(policy_of("Gemma 2"), 2)
    assert caplog.text.count("engine=auto") == 1
    assert run(engine, request("a", [3, 4, 5], 2))["a"].version == 2


@pytest.mark.parametrize("cache", ["auto", "plain"])
@pytest.mark.parametrize("name", ["Llama", "Qwen3.5"])
def test_weights_that_are_not_finite_are_sampled_from(name: str, cache: str):
    policy = SimpleNamespace(causal_lm=build(name))
    with torch.no_grad():
        policy.causal_lm.get_output_embeddings().weight[3] = torch.nan
    with pytest.raises(NotFiniteError, match="a: the policy's logits are not finite at token 0"):
        run(engine_of(policy, cache), request("a", [4, 5, 6], 2))


def test_an_unknown_cache_and_a_prompt_that_does_not_fit_name_their_keys():
    with pytest.raises(ValueError, match=r"engine\.cache='fast' is unknown; allowed: .*=plain"):
        SlotEngine(cache="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"60 tokens.*engine\.max_length=72"):
        engine_of(policy_of("Qwen3.5")).submit([request("a", [3] * 60)])
