"""Packed rows: the same numbers as padded ones, each row blind to the others, nothing dense."""

import copy
from types import SimpleNamespace

import pytest
import torch
from models.families import build
from tiny_play import make_policy
from torch.nn.functional import scaled_dot_product_attention
from transformers import Qwen2Config, Qwen2ForCausalLM

from aem_lightning.modules import Policy, attention
from aem_lightning.modules.attention import (
    Segments,
    attend_by_segment,
    attend_in_one_kernel,
    is_packed,
    packed_attention,
)
from aem_lightning.modules.scoring import MicroBatch
from aem_lightning.rollout import micro_batches, varlen

LENGTHS = (9, 9, 4, 1)
CPU = torch.device("cpu")


@pytest.fixture
def piece():
    """A micro-batch of four rows, two of them of one length, one of a single token."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 20, (4, 9), generator=generator)
    mask = torch.rand(4, 9, generator=generator) < 0.6
    mask[:, 0] = False
    for row, length in enumerate(LENGTHS):
        ids[row, length:], mask[row, length:] = 0, False
    return MicroBatch(torch.arange(4), ids, mask, torch.zeros(int(mask.sum())), LENGTHS)


def gradients(policy, piece, packed):
    policy.zero_grad()
    logprobs, entropies = piece.score(policy, 1.0, packed=packed)
    (logprobs.sum() + 0.3 * entropies.sum()).backward()
    return [parameter.grad.clone() for parameter in policy.trainable().values()]


def test_packing_changes_scores(piece):
    policy = make_policy(awake=True)
    for one, other in zip(
        piece.score(policy, 0.7, packed=True), piece.score(policy, 0.7, packed=False), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packing_changes_gradients(piece, checkpointing):
    policy = make_policy(awake=True).train()
    expected = gradients(policy, piece, packed=False)
    if checkpointing:  # its backward pass runs the layers again
        policy.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        policy.causal_lm.enable_input_require_grads()
    found = gradients(policy, piece, packed=True)
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_packed_row_sees_its_neighbour(piece):
    policy = make_policy(awake=True)
    other = copy.deepcopy(piece)
    other.input_ids[1, :9] = 5
    before, after = (p.score(policy, 1.0, packed=True)[0] for p in (piece, other))
    owner = piece.mask.nonzero()[:, 0]
    assert torch.equal(before[owner != 1], after[owner != 1])
    assert (before[owner == 1] - after[owner == 1]).abs().max() > 1e-3


def test_the_reference_is_scored_with_adapters_when_packed(piece):
    policy = make_policy(awake=True)
    with policy.reference():
        reference = piece.score(policy, 1.0, packed=True)[0]
    expected = piece.score(make_policy(lora=False), 1.0, packed=False)[0]
    torch.testing.assert_close(reference, expected, atol=1e-5, rtol=1e-5)


def test_after_packing_padded_batches_and_masks_are_read_otherwise(piece, tmp_path):
    policy, fresh = make_policy(awake=True), make_policy(awake=True)
    piece.score(policy, 1.0, packed=True)
    left = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    ids = piece.input_ids[:2, :4]
    for mask in (None, left):
        one, other = (
            p.causal_lm(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for p in (policy, fresh)
        )
        assert torch.equal(one[:, -1], other[:, -1])
    policy.save_model(tmp_path)
    assert Policy.from_pretrained(str(tmp_path)).causal_lm.config._attn_implementation == "sdpa"


def test_no_dense_mask_is_made_for_a_packed_row(piece, monkeypatch):
    seen = []

    def spy(module, query, key, value, mask, **options):
        seen.append((mask, options["segments"].lengths))
        return packed_attention(module, query, key, value, mask, **options)

    monkeypatch.setattr(attention, "packed_attention", spy)
    piece.score(make_policy(), 1.0, packed=True)
    monkeypatch.undo()
    attention.AttentionInterface.register(attention.PACKED, packed_attention)
    assert seen == [(None, LENGTHS)] * 2


def dense(query, key, value, lengths, scaling):
    """Attention under the block-diagonal causal mask."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (owner[:, None] == owner).tril()
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True
    ).transpose(1, 2)


def projections(seed=0, heads=4, shared=2, size=8):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, n, sum(LENGTHS), size) for n in (heads, shared, shared)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("scaling", [None, 0.1])
def test_segments_attend_otherwise_than_under_a_block_diagonal_mask(scaling):
    found = attend_by_segment(*projections(), Segments.of(LENGTHS, CPU), scaling)
    torch.testing.assert_close(found, dense(*projections(), LENGTHS, scaling))


@pytest.mark.parametrize("gqa", [False, True])
def test_the_kernel_is_called_with_other_shapes_than_its_own(gqa):
    """A stand-in with the kernel's signature: of torch with and without grouped heads."""
    calls = []

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        calls.append((cu_q.tolist(), cu_q.dtype, max_q, max_k, window_size, tuple(q.shape)))
        assert torch.equal(cu_q, cu_k)
        back = (x.transpose(0, 1)[None] for x in (q, k, v))
        return dense(*back, LENGTHS, scale)[0]

    def grouped(*args, enable_gqa=False, **options):
        assert enable_gqa
        return kernel(*args, **options)

    segments = Segments.of(LENGTHS, CPU)
    found = attend_in_one_kernel(
        grouped if gqa else kernel, *projections(), segments=segments, scaling=0.3
    )
    torch.testing.assert_close(found, dense(*projections(), LENGTHS, 0.3))
    assert calls == [([0, 9, 18, 22, 23], torch.int32, 9, 9, (-1, 0), (23, 4, 8))]


@pytest.mark.gpu
def test_the_kernel_differs_from_a_loop_over_segments_on_a_gpu():
    assert varlen.variable_length_attention() is not None
    segments = Segments.of(LENGTHS, torch.device("cuda"))
    inputs = [x.to("cuda", torch.bfloat16).requires_grad_() for x in projections()]
    results = []
    for attended in (
        packed_attention(None, *inputs, None, segments=segments)[0],
        attend_by_segment(*inputs, segments, None),
    ):
        results.append([attended, *torch.autograd.grad(attended.float().square().sum(), inputs)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=3e-2, rtol=3e-2)


def test_positions_run_on_from_row_to_row():
    segments = Segments.of((3, 1, 2), CPU)
    assert segments.positions.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert segments.offsets.tolist() == [0, 3, 4, 6]


def model(**changes):
    settings = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return Qwen2ForCausalLM(Qwen2Config(**{**settings, **heads, **changes}))


def test_a_model_that_cannot_be_packed_is_padded_and_says_why_when_asked():
    """By its attention, by its layers, or by what a row of two short sequences came out as."""
    eager = model(attn_implementation="eager")
    assert is_packed("auto", model())
    assert is_packed("packed", model())
    assert not is_packed("padded", model())
    others = (eager, "'eager'"), (build("Qwen3.5"), "linear"), (build("Nemotron"), "otherwise")
    for other, reason in others:
        assert not is_packed("auto", other)
        with pytest.raises(ValueError, match=rf"{reason}.*packing=padded"):
            is_packed("packed", other)
        assert other.config._attn_implementation != attention.PACKED
    with pytest.raises(ValueError, match="allowed: packing=auto, packing=packed"):
        is_packed("dense", model())


@pytest.mark.parametrize(("window", "masks"), [(4, 1), (9, 0)])
def test_a_window_is_forgotten_in_packed_rows(piece, monkeypatch, window, masks):
    """Nine tokens under a window of four; one that reaches over all of them needs no mask."""
    sliding = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
    policy = Policy(model(vocab_size=24, **sliding), None)
    seen = []

    def spy(module, query, key, value, mask, **options):
        seen.append(mask)
        return packed_attention(module, query, key, value, mask, **options)

    expected = piece.score(policy, 1.0, packed=False)
    monkeypatch.setattr(attention, "packed_attention", spy)
    found = piece.score(policy, 1.0, packed=True)
    monkeypatch.undo()
    attention.AttentionInterface.register(attention.PACKED, packed_attention)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert [mask.shape for mask in seen if mask is not None] == [(1, 1, 9, 9)] * masks


def test_a_gpu_without_the_kernel_gets_one_call_for_each_row(monkeypatch):
    on_gpu = SimpleNamespace(**{"config": model().config, "_supports_attention_backend": True})
    on_gpu.get_decoder = lambda: SimpleNamespace(config=on_gpu.config)
    on_gpu.base_model = on_gpu
    monkeypatch.setattr(attention, "_trial", lambda model: None)  # nothing is on a GPU here
    on_gpu.device, on_gpu.dtype = torch.device("cuda"), torch.bfloat16
    capability = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    monkeypatch.setattr(varlen, "variable_length_attention", lambda: None)
    on_gpu.config.head_dim = 64
    assert not is_packed("auto", on_gpu)
    monkeypatch.setattr(varlen, "variable_length_attention", lambda: scaled_dot_product_attention)
    assert is_packed("auto", on_gpu)
    capability[0] = (7, 5)  # Turing: FlashAttention would refuse it in the middle of an update
    assert not is_packed("auto", on_gpu)
    capability[0] = (8, 0)
    on_gpu.dtype = torch.float32
    assert not is_packed("auto", on_gpu)
    on_gpu.dtype, on_gpu.config.sliding_window = torch.bfloat16, 64
    assert not is_packed("auto", on_gpu)  # its window takes a call for each row


def test_packed_micro_batches_count_padding():
    lengths = torch.tensor([90, 10, 10, 10, 80])
    assert micro_batches(range(5), lengths, 100, padded=False) == [[0], [4, 1, 2], [3]]
    assert micro_batches(range(5), lengths, 100) == [[0], [4], [1, 2, 3]]
    assert micro_batches([0, 1], lengths, 5, padded=False) == [[0], [1]]
