"""Decode steps and prefills by a kernel that stops at the end of every row, as on a GPU.

The kernel runs on none of this: a stand-in of its signature does the same sums, row by row.
"""

from types import SimpleNamespace

import pytest
import torch
from test_cuda_graphs import capture
from test_slot_cache import episodes
from test_slot_engine import (
    STOP,
    assert_scores_match,
    make_engine,
    make_model,
    request,
    run,
    tokens,
)
from torch.nn.functional import scaled_dot_product_attention

from aem_lightning.rollout import slot_attention, slot_model
from aem_lightning.rollout.cuda_graphs import DecodeGraphs

LENGTHS = [40] * 5 + [300] + [90] * 6


class Kernel:
    """What `varlen_attn` computes, and a list of what it read: keys of each row, and the width."""

    def __init__(self):
        self.reads, self.storages = [], set()

    def __call__(
        self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size,
        enable_gqa, seqused_k,
    ):  # fmt: skip
        assert (window_size, enable_gqa) == ((-1, 0), True)
        assert {x.dtype for x in (cu_seq_q, cu_seq_k, seqused_k)} == {torch.int32}
        self.reads.append((max_q, seqused_k.tolist()))
        if max_q == 1:
            self.storages |= {x.untyped_storage().data_ptr() for x in (key, value)}
        rows = []
        for row, used in enumerate(seqused_k.tolist()):
            q = query[cu_seq_q[row] : cu_seq_q[row + 1]].transpose(0, 1)
            start = int(cu_seq_k[row])
            assert used <= min(max_k, int(cu_seq_k[row + 1]) - start)
            k, v = (x[start : start + used].transpose(0, 1) for x in (key, value))
            seen = torch.ones(q.shape[1], used, dtype=torch.bool).tril(used - q.shape[1])
            attended = scaled_dot_product_attention(
                q, k, v, attn_mask=seen, scale=scale, enable_gqa=True
            )
            rows.append(attended.transpose(0, 1))
        return torch.cat(rows)


@pytest.fixture
def kernel(monkeypatch):
    kernel = Kernel()
    monkeypatch.setattr(slot_model, "cache_kernel_for", lambda *args: kernel)
    return kernel


@pytest.fixture
def policy():
    return SimpleNamespace(causal_lm=make_model())


def assert_plays_alike(policy, played, plain):
    for place, (prompt, result) in plain.items():
        assert played[place][0] == prompt
        assert played[place][1].tokens == result.tokens
        assert played[place][1].logprobs == pytest.approx(result.logprobs, abs=1e-5)
        assert_scores_match(policy, prompt, played[place][1], 0.8)


@pytest.mark.parametrize("shapes", ["own", "few", "graphs"])
def test_a_row_reads_no_more_than_its_own_tokens(policy, monkeypatch, shapes):
    plain = episodes(make_engine(policy, slots=12, max_length=1024), LENGTHS)
    kernel = Kernel()
    monkeypatch.setattr(slot_model, "cache_kernel_for", lambda *args: kernel)
    masked = []
    monkeypatch.setattr(
        slot_attention, "scaled_dot_product_attention", lambda *args, **kw: masked.append(args)
    )
    engine = make_engine(policy, slots=12, max_length=1024)
    engine._model.few_shapes = shapes != "own"
    if shapes == "graphs":
        engine._model.graphs = DecodeGraphs(12, 1023, capture)
    played = episodes(engine, LENGTHS, turns=1)
    kernel.reads.clear()
    kernel.storages.clear()
    blocks = [*engine._model.cache._keys.values(), *engine._model.cache._values.values()]
    played = episodes(engine, LENGTHS)
    assert_plays_alike(policy, played, plain)
    assert not masked
    held = {block.untyped_storage().data_ptr() for block in blocks}
    if shapes != "own":  # there a prompt's last token alone is fed to rows that are no neighbours
        assert kernel.storages == held, "keys were copied to be read"
    decoded = [used for width, used in kernel.reads if width == 1]
    assert all(sorted(used)[-2] < 130 for used in decoded), "another row read as far as the longest"
    assert sum(map(sum, decoded)) < 0.5 * sum(len(used) * max(used) for used in decoded)


def test_a_prompt_whose_padding_has_no_room_is_computed_under_a_mask(policy, kernel):
    """230 tokens and 20 beside them in a wave of 64 columns: the padding would end behind 256."""
    engine = make_engine(policy, slots=4, max_length=256)
    engine._model.few_shapes = True
    first = run(engine, request("a", tokens(225, 1), 4), request("b", tokens(10, 2), 4))
    kernel.reads.clear()
    longer = {
        key: [*tokens(count, seed), *first[key].tokens, *tokens(more, 9)]
        for key, count, seed, more in (("a", 225, 1, 5), ("b", 10, 2, 40))
    }
    results = run(engine, *(request(key, ids, 6, 1.0, STOP) for key, ids in longer.items()))
    assert not [used for width, used in kernel.reads if width > 1]
    assert [used for width, used in kernel.reads if width == 1]
    for key, prompt in longer.items():
        assert_scores_match(policy, prompt, results[key], 1.0)


class Wrong(Kernel):
    def __call__(self, query, *args, **options):
        return super().__call__(query, *args, **options).roll(1, 0)


def refusing(*args, **options):
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nmore")


@pytest.mark.parametrize("broken", [refusing, Wrong()])
def test_a_kernel_that_fails_or_is_wrong_is_told_once_and_left_out(
    policy, monkeypatch, caplog, broken
):
    plain = episodes(make_engine(policy, slots=12), [40, 90])
    slot_model.TRIED.discard(policy.causal_lm)
    monkeypatch.setattr(slot_model, "cache_kernel_for", lambda *args: broken)
    engine = make_engine(policy, slots=12)
    engine.sync(policy, 2)
    assert_plays_alike(policy, episodes(engine, [40, 90]), plain)
    assert caplog.text.count("engine=hf: attention under a mask") == 1
    assert engine._model.kernel is None


def test_a_kernel_that_no_graph_can_hold_is_left_out_and_graphs_are_kept(policy, kernel, caplog):
    def strict(step):
        kernel.reads.clear()
        captured = capture(step)
        if kernel.reads:
            raise RuntimeError("operation not permitted when stream is capturing")
        return captured

    engine = make_engine(policy, slots=12)
    engine._model.graphs = DecodeGraphs(12, 255, strict)
    played = episodes(engine, [40, 90])
    assert len(engine._model.graphs) > 0
    assert not engine._model.graphs.is_broken
    for prompt, result in played.values():
        assert_scores_match(policy, prompt, result, 0.8)
    assert caplog.text.count("engine=hf: attention under a mask") == 1


def test_layers_with_windows_keep_their_masks():
    sliding = SimpleNamespace(layer_types=["sliding_attention", "full_attention"])
    assert slot_model.cache_kernel_for(torch.device("cuda"), torch.bfloat16, sliding) is None
