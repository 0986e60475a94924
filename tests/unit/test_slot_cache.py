"""Keys and values grow with what episodes hold, and a decode step reads what its rows hold."""

from types import SimpleNamespace

import pytest
import torch
from test_slot_engine import (
    STOP,
    assert_scores_match,
    make_engine,
    make_model,
    request,
    run,
    tokens,
)

from aem_lightning.rollout import slot_attention, slot_cache
from aem_lightning.rollout.cuda_graphs import DecodeGraphs
from aem_lightning.rollout.slot_cache import SlotCache, block_shape, bytes_of_token


@pytest.fixture(scope="module")
def policy():
    return SimpleNamespace(causal_lm=make_model())


def allocated(engine):
    """Rows and tokens that are allocated, by the bytes."""
    cache = engine._model.cache
    token = bytes_of_token(engine._model._config, torch.float32)
    assert cache.nbytes == token * cache.shape[0] * cache.shape[1]
    return cache.shape


def episodes(engine, lengths, turns=2, new=9):
    """Results by episode and turn; every episode stays open."""
    prompts = {f"{i}": tokens(length, i) for i, length in enumerate(lengths)}
    played = {}
    for turn in range(turns):
        asked = [
            request(key, prompt, new + int(key) % 3, 0.8, STOP, 10 * int(key) + turn)
            for key, prompt in prompts.items()
        ]
        for key, result in run(engine, *asked).items():
            played[key, turn] = (prompts[key], result)
            prompts[key] = [*prompts[key], *result.tokens, *tokens(5 + turn, int(key))]
    return played


def test_memory_is_that_of_all_slots_at_full_length(policy):
    engine = make_engine(policy, slots=64, max_length=8192)
    assert allocated(engine) == (0, 0)
    grown = episodes(engine, [40, 60, 100], turns=1)
    assert allocated(engine) == (8, 256)
    grown |= episodes(engine, [40, 60, 300, *[30] * 9])
    assert allocated(engine) == (16, 512)
    full = make_engine(policy, slots=64, max_length=1024)
    full._model.cache.fit(64, 1023)  # as it was before blocks could grow
    kept = episodes(full, [40, 60, 100], turns=1)
    kept |= episodes(full, [40, 60, 300, *[30] * 9])
    assert allocated(full) == (64, 1024)
    assert grown == kept


def test_a_row_that_fills_its_block_loses_its_last_token_to_padding(policy):
    """At 255 tokens of 256 the next one would lie where the padding of others goes."""
    engine = make_engine(policy, slots=4, max_length=4096)
    prompt, mate = tokens(250, 1), tokens(3, 2)
    results = run(engine, request("long", prompt, 20), request("mate", mate, 2))
    assert allocated(engine) == (4, 512)
    assert_scores_match(policy, prompt, results["long"], 1.0)
    longer = [*prompt, *results["long"].tokens]
    results = run(engine, request("long", longer, 2), request("mate", [*mate, *tokens(90, 3)], 9))
    assert_scores_match(policy, longer, results["long"], 1.0)


def test_a_long_episode_of_an_earlier_rollout_is_paid_for_ever_after(policy):
    engine = make_engine(policy, slots=64, max_length=4096)
    run(engine, request("long", tokens(900, 0), 4))
    assert allocated(engine) == (8, 1024)
    engine.close("long")
    assert allocated(engine) == (8, 1024), "given back, though this rollout needed it"
    engine.sync(policy, 2)
    prompt = tokens(50, 1)
    first = run(engine, request("a", prompt, 4), request("b", tokens(60, 2), 4))["a"]
    engine.close("b")
    assert allocated(engine) == (8, 1024), "an open episode may go on"
    engine.close("a")
    assert allocated(engine) == (8, 256)
    # What is left is still read: an episode that comes later borrows it.
    again = run(engine, request("c", [*prompt, *first.tokens], 4))["c"]
    assert again.reused > 48
    assert_scores_match(policy, [*prompt, *first.tokens], again, 1.0)


def test_growth_that_a_gpu_has_no_room_for_is_a_bare_out_of_memory(policy, monkeypatch):
    engine = make_engine(policy, slots=8, max_length=4096)
    run(engine, request("a", tokens(100, 0), 4))
    held = engine._model.cache.nbytes
    monkeypatch.setattr(slot_cache, "free_bytes", lambda device: held // 2)
    with pytest.raises(MemoryError, match=r"concurrency=6 or max_context=384 "):
        run(engine, request("b", tokens(300, 1), 4))
    assert allocated(engine) == (8, 256)


def test_every_row_of_a_step_reads_as_far_as_the_longest(policy, monkeypatch):
    attention, reads = slot_attention.scaled_dot_product_attention, []

    def counted(query, key, value, **options):
        if query.shape[2] == 2:  # a token of two query heads a key-value head: a decode step
            reads.append(key.shape[0] * key.shape[2])
        return attention(query, key, value, **options)

    monkeypatch.setattr(slot_attention, "scaled_dot_product_attention", counted)
    lengths = [40] * 5 + [1500] + [90] * 6
    played = episodes(make_engine(policy, slots=12, max_length=4096), lengths)
    own, few = sum(reads), len(reads)
    for prompt, result in played.values():
        assert_scores_match(policy, prompt, result, 0.8)
    reads.clear()
    monkeypatch.setattr("aem_lightning.rollout.slot_model.pieces_of", lambda ends, read: [])
    whole = episodes(make_engine(policy, slots=12, max_length=4096), lengths)
    assert sum(reads) > 1.5 * own
    assert few < 3 * len(reads)
    for place, (prompt, result) in whole.items():
        assert played[place][0] == prompt
        assert played[place][1].tokens == result.tokens
        assert played[place][1].logprobs == pytest.approx(result.logprobs, abs=1e-5)


def test_a_graph_of_a_cache_that_has_moved_is_replayed(policy):
    calls = []

    def capture(step):
        """As a graph: it goes on writing where the cache was when it was captured."""
        cache = engine._model.cache
        place = {layer: block.data_ptr() for layer, block in cache._keys.items()}
        calls.append(cache.shape)
        step()

        def replay():
            assert place == {layer: block.data_ptr() for layer, block in cache._keys.items()}
            return step()

        return replay

    lengths = [20, 230, 30, 40, 200, *[25] * 6]
    eager = episodes(make_engine(policy, slots=16, max_length=4096), lengths, 4, 40)
    engine = make_engine(policy, slots=16, max_length=4096, bucket=128)
    engine._model.graphs = DecodeGraphs(16, 4095, capture)
    static = episodes(engine, lengths, 4, 40)
    assert len(set(calls)) > 1, "the cache did not grow"
    assert len(engine._model.graphs) < len(calls) < 12
    for place, (prompt, result) in static.items():
        assert result.tokens == eager[place][1].tokens
        assert_scores_match(policy, prompt, result, 0.8)


def test_a_stored_cache_comes_back_in_another_shape_with_other_contents():
    cache, device = SlotCache(64, 4096), torch.device("cpu")
    cache.fit(3, 300)
    cache.aim([0, 1, 2], torch.full((3, 1), 299), 300)
    keys, values = (torch.randn(3, 2, 1, 4) for _ in range(2))
    cache.update(keys, values, 0)
    held = cache.held(300, 10**9)
    other = SlotCache(64, 4096)
    other.fill(held, device)
    assert other.shape == cache.shape == block_shape(3, 300, 64, 4096) == (8, 512)
    assert torch.equal(other._keys[0], cache._keys[0])
    assert torch.equal(other._values[0][:3, :, 299:300], values)
    assert cache.held(300, 1) is None
