import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aem_lightning.functional import token_logprob_entropy


def naive(hidden, weight, targets, temperature):
    logprobs = torch.log_softmax(hidden @ weight.t() / temperature, dim=-1)
    return logprobs.gather(1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def random_head(tokens=37, width=24, vocabulary=211, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, dtype=dtype)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=dtype) * 0.5
    return hidden, weight, torch.randint(vocabulary, (tokens,), generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("parts", ["logprob", "entropy", "both"])
@pytest.mark.parametrize("train_weight", [True, False])
def test_values_and_gradients_equal_the_full_logits(temperature, parts, train_weight):
    hidden, weight, targets = random_head()
    got = []
    for function in (token_logprob_entropy, naive):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(train_weight)
        chunk = {"chunk": 8} if function is token_logprob_entropy else {}
        logprobs, entropies = function(h, w, targets, temperature, **chunk)
        weights = torch.linspace(-1, 2, len(targets), dtype=torch.float64)
        loss = 0.0
        if parts != "entropy":
            loss = loss + (weights * logprobs).sum()
        if parts != "logprob":
            loss = loss + (weights.flip(0) * entropies).sum()
        loss.backward()
        got.append((logprobs.detach(), entropies.detach(), h.grad, w.grad))
    for ours, reference in zip(*got, strict=True):
        if reference is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


def test_gradcheck_through_both_outputs():
    hidden, weight, targets = random_head(tokens=6, width=5, vocabulary=9)
    hidden.requires_grad_()
    weight.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: token_logprob_entropy(h, w, targets, 0.8, chunk=4), (hidden, weight)
    )


@pytest.mark.parametrize("chunk", [1, 5, 37, 1000])
def test_the_chunk_size_does_not_matter(chunk):
    hidden, weight, targets = random_head()
    expected = naive(hidden, weight, targets, 1.0)
    torch.testing.assert_close(
        token_logprob_entropy(hidden, weight, targets, chunk=chunk), expected
    )


def test_half_precision_states_give_float32_sums():
    hidden, weight, targets = random_head(dtype=torch.float32)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    logprobs, entropies = token_logprob_entropy(hidden, weight, targets)
    assert logprobs.dtype == entropies.dtype == torch.float32
    logits = (hidden @ weight.t()).double()
    expected = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected.float(), rtol=1e-5, atol=1e-5)


def test_under_autocast_the_backward_pass_recomputes_the_logits_of_the_forward_pass():
    hidden, weight, targets = random_head(dtype=torch.float32)
    gradients = []
    for function in (token_logprob_entropy, naive):
        h = hidden.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logprobs, entropies = function(h, weight, targets, 1.0)
        (logprobs.float().sum() + entropies.float().sum()).backward()
        assert h.grad.dtype == torch.float32
        gradients.append(h.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0.05, atol=0.05)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_tensor_of_tokens_times_vocabulary_is_ever_made():
    tokens, vocabulary, chunk = 2048, 512, 64
    hidden, weight, targets = random_head(tokens, 8, vocabulary, torch.float32)
    hidden.requires_grad_()
    with LargestTensor() as largest:
        logprobs, entropies = token_logprob_entropy(hidden, weight, targets, chunk=chunk)
        (logprobs.sum() + entropies.sum()).backward()
    assert largest.elements == chunk * vocabulary


def test_no_tokens_give_no_values_and_a_zero_gradient():
    _, weight, _ = random_head()
    hidden = torch.zeros(0, 24, dtype=torch.float64, requires_grad=True)
    weight.requires_grad_()
    logprobs, entropies = token_logprob_entropy(hidden, weight, torch.zeros(0, dtype=torch.long))
    (logprobs.sum() + entropies.sum()).backward()
    assert logprobs.shape == (0,)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_bad_arguments_are_named():
    hidden, weight, targets = random_head()
    with pytest.raises(ValueError, match="temperature=0"):
        token_logprob_entropy(hidden, weight, targets, 0.0)
    with pytest.raises(ValueError, match="chunk=0"):
        token_logprob_entropy(hidden, weight, targets, chunk=0)
    with pytest.raises(ValueError, match="targets must be"):
        token_logprob_entropy(hidden, weight, targets[1:])
    with pytest.raises(ValueError, match=r"\[T, d\]"):
        token_logprob_entropy(hidden[None], weight, targets)
