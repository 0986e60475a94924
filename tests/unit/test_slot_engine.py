import random
from contextlib import contextmanager
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from models.families import build
from peft import LoraConfig, inject_adapter_in_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from aem_lightning.rollout import slot_model
from aem_lightning.rollout.engine import Request, RolloutEngine, Sampling
from aem_lightning.rollout.sampling import draw, request_uniforms
from aem_lightning.rollout.slot_engine import SlotEngine
from aem_lightning.rollout.slot_model import waves

VOCABULARY = 97
STOP = (5, 6, 7)


def make_model(kind="qwen2", **options):
    torch.manual_seed(0)
    config_class, model_class = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }[kind]
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        **options,
    )
    model = model_class(config)
    lora = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.5, target_modules=["q_proj", "v_proj", "up_proj"]
    )
    model = inject_adapter_in_model(lora, model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model.train()


@pytest.fixture(scope="module")
def shared_model():
    return make_model()


@pytest.fixture
def policy(shared_model):
    return SimpleNamespace(causal_lm=shared_model)


def make_engine(policy, slots=8, max_length=256, bucket=16):
    engine = SlotEngine(slots=slots, max_length=max_length, bucket=bucket)
    engine.sync(policy, 1)
    return engine


def tokens(count, seed):
    return [random.Random(seed).randrange(8, VOCABULARY) for _ in range(count)]


def request(key, prompt, new=12, temperature=1.0, stop=(), seed=0):
    return Request(key, prompt, Sampling(temperature, new, stop), seed)


def run(engine, *requests):
    engine.submit(requests)
    return {result.key: result for result in engine.poll(wait_all=True)}


@contextmanager
def evaluated(policy):
    policy.causal_lm.eval()
    with torch.no_grad():
        yield policy.causal_lm
    policy.causal_lm.train()


def scored(policy, prompt, response, temperature):
    """Log-probabilities and entropies of a response by one forward pass over everything."""
    ids = torch.tensor([[*prompt, *response]])
    with evaluated(policy) as model:
        logits = model(input_ids=ids, use_cache=False).logits[0]
    logprobs = (logits[len(prompt) - 1 : -1].double() / temperature).log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(response)[:, None])[:, 0]
    return chosen.float(), -(logprobs.exp() * logprobs).sum(-1).float()


def assert_scores_match(policy, prompt, result, temperature):
    logprobs, entropies = scored(policy, prompt, result.tokens, temperature)
    torch.testing.assert_close(torch.tensor(result.logprobs), logprobs, atol=2e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(result.entropies), entropies, atol=2e-5, rtol=0)


def play(policy, memory, slots, wait_all, turns=3):
    """16 episodes of 4 groups, every response checked; the engine."""
    engine, rng = make_engine(policy, slots=slots), random.Random(0)
    heads = [tokens(40 + 5 * group, group) for group in range(4)]
    history = {f"{i // 4}/{i % 4}": [] for i in range(16)}
    responses, prompts = {}, {}

    def ask(key):
        turn = len(history[key])
        past = history[key][-2:] if memory == "window" else history[key]
        prompts[key] = [*heads[int(key[0])], *chain.from_iterable(past)]
        seed = 100 * int(key[0]) + 10 * int(key[2]) + turn
        return request(key, prompts[key], 6 + turn, 0.8, STOP, seed)

    engine.submit(ask(key) for key in history)
    live = set(history)
    while live:
        following = []
        for result in engine.poll(wait_all=wait_all):
            assert_scores_match(policy, prompts[result.key], result, 0.8)
            seen = history[result.key]
            responses[result.key, len(seen)] = result.tokens
            seen.append(result.tokens + tokens(rng.randint(3, 12), len(responses)))
            if len(seen) == turns:
                engine.close(result.key)
                live.discard(result.key)
            else:
                following.append(ask(result.key))
        engine.submit(following)
    assert len(responses) == 16 * turns
    return engine


@pytest.mark.parametrize("memory", ["transcript", "window"])
@pytest.mark.parametrize("wait_all", [True, False])
@pytest.mark.parametrize("slots", [16, 6])
def test_multi_turn_scores_equal_teacher_forcing(policy, memory, wait_all, slots):
    engine = play(policy, memory, slots, wait_all)
    assert engine.stats["reused"] > 0
    assert engine.stats["forked"] > 0
    assert (engine.stats["evicted"] > 0) == (wait_all and slots < 16)


@pytest.mark.parametrize(
    "options", [{}, {"attn_implementation": "eager"}, {"tie_word_embeddings": True}]
)
def test_llama_attention_kinds_and_tied_heads_are_scored_right(options):
    policy = SimpleNamespace(causal_lm=make_model("llama", **options))
    prompt = tokens(30, 0)
    result = run(make_engine(policy), request("a", prompt))["a"]
    assert_scores_match(policy, prompt, result, 1.0)
    assert policy.causal_lm.config._attn_implementation == options.get(
        "attn_implementation", "sdpa"
    )


def test_it_is_a_rollout_engine(policy):
    assert isinstance(make_engine(policy), RolloutEngine)


def test_a_forked_prompt_continues_exactly_like_its_own_prefill(policy):
    prompt = tokens(50, 1)
    engine = make_engine(policy)
    results = run(engine, *(request(f"{i}", prompt, seed=i % 2) for i in range(4)))
    assert engine.stats["prefilled"] == 50
    assert engine.stats["forked"] == 150
    for leader, copied in (("0", "2"), ("1", "3")):
        assert results[leader].tokens == results[copied].tokens
        assert results[leader].logprobs == results[copied].logprobs
    assert results["0"].tokens != results["1"].tokens
    alone = run(make_engine(policy), request("1", prompt, seed=1))["1"]
    assert alone.tokens == results["1"].tokens
    assert_scores_match(policy, prompt, results["1"], 1.0)


def test_a_late_copy_borrows_what_another_slot_holds_of_its_prompt(policy):
    engine, prompt, other = make_engine(policy), tokens(50, 1), tokens(20, 2)
    early = run(engine, request("0", prompt, seed=0))["0"]
    grown = [*prompt, *early.tokens, *other]
    requests = [request("0", grown, seed=1), request("1", prompt, seed=1), request("2", other)]
    late = run(engine, *requests, request("3", [*prompt[:40], *other], seed=2))
    assert engine.stats["forked"] == 49 + 40
    assert late["1"].reused == 49
    assert late["3"].reused == 40
    assert late["2"].reused == 0
    for key, ids in (("0", grown), ("1", prompt), ("2", other), ("3", [*prompt[:40], *other])):
        assert_scores_match(policy, ids, late[key], 1.0)
    alone = run(make_engine(policy), request("1", prompt, seed=1))["1"]
    assert late["1"].tokens == alone.tokens


def test_a_sample_does_not_depend_on_its_batch_mates(policy):
    prompt = tokens(33, 2)
    alone = run(make_engine(policy), request("x", prompt, 20, seed=9))["x"]
    crowd = [request(f"{i}", tokens(10 + 9 * i, i), 3 + 4 * i, seed=i) for i in range(7)]
    together = run(make_engine(policy), *crowd[:3], request("x", prompt, 20, seed=9), *crowd[3:])
    assert together["x"].tokens == alone.tokens
    torch.testing.assert_close(
        torch.tensor(together["x"].logprobs), torch.tensor(alone.logprobs), atol=1e-5, rtol=0
    )


def test_the_same_submissions_give_the_same_bits(policy):
    requests = [request(f"{i}", tokens(10 + 7 * i, i % 3), 5 + i, seed=i) for i in range(12)]
    first, second = (run(make_engine(policy), *requests) for _ in range(2))
    assert list(first) == list(second) == [f"{i}" for i in range(12)]
    assert first == second


def test_seeds_that_differ_only_in_their_high_bits_draw_differently():
    assert request_uniforms(1, 4) != request_uniforms(1 + (1 << 40), 4)
    assert request_uniforms(-3, 4) == request_uniforms(-3, 4)
    assert request_uniforms(1, 9)[:4] == request_uniforms(1, 9)[:4]


def test_sync_forgets_keys_and_values_of_the_old_weights():
    policy = SimpleNamespace(causal_lm=make_model())
    engine, prompt = make_engine(policy), tokens(40, 3)
    first = run(engine, request("a", prompt))["a"]
    with torch.no_grad():
        for name, parameter in policy.causal_lm.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    engine.sync(policy, 2)
    second = run(engine, request("a", [*prompt, *first.tokens]))["a"]
    assert (first.version, second.version) == (1, 2)
    assert second.reused == 0
    assert_scores_match(policy, [*prompt, *first.tokens], second, 1.0)


def test_sync_refuses_to_mix_policies_in_a_response(policy):
    engine = make_engine(policy)
    engine.submit([request("a", tokens(9, 0), 30), request("b", tokens(9, 0), 2)])
    engine.poll()
    with pytest.raises(RuntimeError, match=r"1 unfinished.*poll\(wait_all=True\)"):
        engine.sync(policy, 2)
    engine.close("a")
    engine.sync(policy, 2)


def test_greedy_takes_the_most_likely_token_at_temperature_one(policy):
    prompt = tokens(30, 4)
    result = run(make_engine(policy), request("a", prompt, 8, temperature=0.0, seed=5))["a"]
    assert_scores_match(policy, prompt, result, 1.0)
    ids = list(prompt)
    with evaluated(policy) as model:
        for token in result.tokens:
            assert token == model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
            ids.append(token)


def test_a_response_ends_at_a_stop_token_or_at_its_length(policy):
    prompt = tokens(20, 5)
    free = run(make_engine(policy), request("a", prompt, 10))["a"]
    assert (free.finish_reason, len(free.tokens)) == ("length", 10)
    stop = free.tokens[4]
    cut = run(make_engine(policy), request("a", prompt, 10, stop=(stop,)))["a"]
    assert cut.finish_reason == "stop"
    assert cut.tokens == free.tokens[: free.tokens.index(stop) + 1]
    assert len(cut.logprobs) == len(cut.entropies) == len(cut.tokens)


def test_poll_returns_as_soon_as_one_has_finished(policy):
    engine = make_engine(policy)
    engine.submit([request("long", tokens(9, 0), 9), request("short", tokens(12, 1), 3)])
    assert [result.key for result in engine.poll()] == ["short"]
    assert [result.key for result in engine.poll()] == ["long"]
    assert engine.poll() == []


def test_poll_runs_until_enough_have_finished(policy):
    engine = make_engine(policy)
    engine.submit(request(str(count), tokens(9 + count, 0), count) for count in (9, 3, 5, 7))
    assert [result.key for result in engine.poll(at_least=2)] == ["3", "5"]
    assert engine.stats["decode_steps"] == 5
    assert [result.key for result in engine.poll(at_least=8)] == ["9", "7"]


def test_the_last_token_of_a_row_that_fills_its_slot_is_scored_right(policy):
    prompt, mate = tokens(20, 6), tokens(3, 7)
    engine = make_engine(policy, max_length=32)
    first = run(engine, request("full", prompt, 12), request("mate", mate, 1))["full"]
    assert_scores_match(policy, prompt, first, 1.0)
    # The full row's next chunk is one token long and padded to its mate's far beyond the end of the
    # slot.
    longer = [*prompt, *first.tokens][:31]
    results = run(engine, request("full", longer, 1), request("mate", tokens(28, 8), 1))
    assert_scores_match(policy, longer, results["full"], 1.0)
    assert_scores_match(policy, tokens(28, 8), results["mate"], 1.0)


def test_a_prompt_that_does_not_fit_names_the_way_out_and_queues_nothing(policy):
    engine = make_engine(policy, max_length=64)
    with pytest.raises(
        ValueError, match=r"ep3.*60 tokens.*max_new_tokens=12.*max_length=64"
    ) as error:
        engine.submit([request("ok", tokens(5, 0)), request("ep3", tokens(60, 0))])
    assert "engine.max_length=72" in str(error.value)
    assert "memory=window" in str(error.value)
    assert engine.poll() == []


def test_an_empty_prompt_and_a_busy_key_are_refused(policy):
    engine = make_engine(policy)
    with pytest.raises(ValueError, match="empty"):
        engine.submit([request("a", [])])
    engine.submit([request("a", tokens(5, 0))])
    with pytest.raises(ValueError, match="a: submitted again"):
        engine.submit([request("a", tokens(5, 0))])


def test_submitting_and_polling_before_sync_are_refused():
    with pytest.raises(RuntimeError, match=r"call sync\(policy, version\)"):
        SlotEngine().poll()
    with pytest.raises(RuntimeError, match=r"call sync\(policy, version\)"):
        SlotEngine().submit([request("a", tokens(5, 0))])


@pytest.mark.parametrize(
    ("kind", "options", "told"),
    [
        (Sampling, {"temperature": -1.0}, "temperature"),
        (Sampling, {"temperature": float("nan")}, "temperature"),
        (Sampling, {"max_new_tokens": 0}, "max_new_tokens"),
        (SlotEngine, {"slots": 0}, r"engine\.slots=0"),
    ],
)
def test_options_out_of_range_are_refused(kind, options, told):
    with pytest.raises(ValueError, match=told):
        kind(**options)


def test_closing_frees_the_slot_for_a_waiting_episode(policy):
    engine = make_engine(policy, slots=1)
    assert list(run(engine, request("a", tokens(9, 0), 4))) == ["a"]
    engine.close("a")
    assert list(run(engine, request("b", tokens(9, 1), 4))) == ["b"]
    assert engine.stats["evicted"] == 0
    engine.close("never seen")


def test_closing_drops_waiting_and_running_requests_and_leaves_the_others_right(policy):
    engine = make_engine(policy, slots=3)
    prompts = {key: tokens(9 + i, i) for i, key in enumerate("abcd")}
    engine.submit(
        [request(key, prompt, 3 if key == "a" else 20) for key, prompt in prompts.items()]
    )
    assert [result.key for result in engine.poll()] == ["a"]
    engine.close("b")
    engine.close("d")
    (result,) = engine.poll(wait_all=True)
    assert result.key == "c"
    assert_scores_match(policy, prompts["c"], result, 1.0)


def test_an_evicted_episode_is_computed_again_and_scored_right(policy, caplog):
    engine, first, second = make_engine(policy, slots=1), tokens(30, 0), tokens(20, 1)
    answer = run(engine, request("a", first), request("b", second))["a"]
    following = [*first, *answer.tokens, *tokens(5, 2)]
    again = run(engine, request("a", following))["a"]
    assert engine.stats["evicted"] == 2
    assert again.reused == 0
    assert_scores_match(policy, following, again, 1.0)
    assert "engine.slots=1" in caplog.text


def test_the_training_mode_of_every_submodule_comes_back(policy):
    model = policy.causal_lm
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    engine = make_engine(policy)
    results = run(engine, request("a", tokens(9, 0)))
    assert [module.training for module in model.modules()] == before
    model.train()
    # LoRA dropout was off: one more draw gives the same.
    assert run(make_engine(policy), request("a", tokens(9, 0))) == results


def test_a_rollout_inside_autocast_does_not_take_the_gradient_from_a_later_training_pass():
    model = make_model()
    gradients = []
    for rollout in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if rollout:
                run(make_engine(SimpleNamespace(causal_lm=model)), request("a", tokens(9, 0)))
            model.eval()(
                input_ids=torch.tensor([tokens(9, 1)])
            ).logits.float().square().mean().backward()
            model.train()
        gradients.append({n: p.grad for n, p in model.named_parameters() if "lora" in n})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name])


def test_inside_autocast_keys_and_values_are_kept_in_its_type_with_the_same_results():
    policy = SimpleNamespace(causal_lm=make_model())
    asked = request("a", tokens(9, 0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        engine = make_engine(policy)
        result = run(engine, asked)
        cache = engine._model.cache
        # What rotary embeddings leave in float32 is what attention would round at every step.
        assert {block.dtype for block in cache._keys.values()} == {torch.bfloat16}
        assert {block.dtype for block in cache._values.values()} == {torch.bfloat16}
        wide = make_engine(policy)
        for store in (wide._model.cache._keys, wide._model.cache._values):
            store.update({i: torch.zeros(8, 2, 256, 8) for i in range(2)})
        assert run(wide, asked) == result


def test_a_model_that_would_be_sampled_wrongly_is_not_refused():
    """Soft-capped attention, states in place of keys, and a mask that is ignored."""
    for name, told in (
        ("Gemma 2", "a soft cap or sinks"),
        ("Qwen3.5", "'SlotCache' object has no attribute"),
        ("Mamba", r"come out \d.* nats off the model's own"),
    ):
        model = build(name).train()
        with pytest.raises(ValueError, match=rf"engine=hf cannot run .*{told}.*engine=auto"):
            make_engine(SimpleNamespace(causal_lm=model))
        assert model.config._attn_implementation != "aem_slots"
        assert all(module.training for module in model.modules())


def test_a_model_is_tried_again_at_every_sync(monkeypatch):
    tried = []
    probe = slot_model.probe_rows
    monkeypatch.setattr(slot_model, "probe_rows", lambda *a: tried.append(a) or probe(*a))
    policy = SimpleNamespace(causal_lm=make_model())
    engine = make_engine(policy)
    engine.sync(policy, 1)
    assert len(tried) == 1
    engine.sync(SimpleNamespace(causal_lm=make_model()), 2)
    assert len(tried) == 2


def test_logits_that_are_not_finite_stop_the_run():
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    engine = make_engine(SimpleNamespace(causal_lm=model))
    engine.submit([request("ep", tokens(5, 0))])
    with pytest.raises(ValueError, match="ep: the policy's logits are not finite"):
        engine.poll()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_draws_follow_the_distribution(temperature):
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)) * 1.5
    logits[0, [0, 11]] = -torch.inf
    count = 40_000
    uniforms = torch.rand(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn, logprobs, entropies = draw(
        logits.expand(count, -1), torch.full((count,), temperature), uniforms
    )
    probs = (logits[0] / temperature).softmax(-1)
    expected = probs[1:11] * count
    observed = torch.bincount(drawn, minlength=12)
    assert observed[0] == observed[11] == 0
    chi_square = ((observed[1:11] - expected).square() / expected).sum()
    assert chi_square < 27.9  # 9 degrees of freedom: exceeded once in 1,000 seeds
    torch.testing.assert_close(logprobs, probs.log()[drawn])
    assert entropies.isfinite().all()


def test_the_engine_samples_the_models_distribution(policy):
    prompt, count = tokens(6, 3), 1500
    with evaluated(policy) as model:
        probs = model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
    engine = make_engine(policy, slots=50)
    results = run(engine, *(request(f"{i}", prompt, 1, seed=i) for i in range(count)))
    observed = torch.bincount(
        torch.tensor([result.tokens[0] for result in results.values()]), minlength=VOCABULARY
    )
    big = probs * count >= 5
    cells = torch.cat([observed[big].float(), observed[~big].sum()[None].float()])
    expected = torch.cat([probs[big], probs[~big].sum()[None]]) * count
    freedom = len(cells) - 1
    chi_square = ((cells - expected).square() / expected.clamp(min=1e-9)).sum().item()
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2**-53])
def test_the_ends_of_the_unit_interval_hit_possible_tokens(uniform):
    logits = torch.tensor([[-torch.inf, 1.0, 2.0, -200.0, -torch.inf]])
    drawn, logprobs, _ = draw(logits, torch.ones(1), torch.tensor([uniform], dtype=torch.float64))
    assert drawn.item() in (1, 2)
    assert logprobs.isfinite().all()


def test_ragged_prompts_are_split_into_waves_with_bounded_padding():
    rng = random.Random(0)
    lengths = {row: rng.choice([10, 40, 900, 1000]) for row in range(60)}
    batches = waves(lengths)
    assert sorted(chain.from_iterable(batches)) == list(range(60))
    for wave in batches:
        padded = len(wave) * max(lengths[row] for row in wave)
        assert wave == sorted(wave)
        assert padded - sum(lengths[row] for row in wave) <= max(256, padded / 4)
        assert padded <= 8192
