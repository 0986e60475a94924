"""Log-probabilities are a model's own, in padded rows, packed rows and the engine, or refused."""

from pathlib import Path

import pytest
import torch
import transformers
from models.families import FAMILIES, build, engine_gap, probe_ids, score_gap
from peft import PeftModel
from tiny_play import word_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

from aem_lightning.modules import Lora, Policy
from aem_lightning.modules.attention import packing_obstacle
from aem_lightning.modules.value import ValueHead
from aem_lightning.rollout import SlotEngine

# What the slots cannot hold, or how they cannot attend.
REFUSED = {
    "Bamba",
    "Falcon H1",
    "Gemma 2",
    "Granite 4",
    "Jamba",
    "LFM2",
    "Mamba",
    "Nemotron-H",
    "Qwen3-Next",
    "Qwen3.5",
    "VaultGemma",
    "gpt-oss",
}
# Everything between the last hidden state and the logits that is no product.
WITH_MORE = {
    "Cohere",
    "Cohere 2",
    "CodeGen",
    "Falcon H1",
    "GPT-J",
    "Gemma 2",
    "Gemma 4",
    "Granite",
    "Granite 4",
    "Granite MoE",
    "HyperCLOVA X",
    "MiniCPM3",
    "ModernBERT decoder",
    "Phi",
    "Phi-3.5 MoE",
    "VaultGemma",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_off_its_own_log_probabilities(name):
    policy = Policy(build(name), None)
    assert (policy.head.weight is None) == (name in WITH_MORE)
    assert score_gap(policy) < 1e-5
    if packing_obstacle(policy.causal_lm) is None:
        assert score_gap(policy, (17, 24)) < 1e-5
    engine = SlotEngine(slots=2, max_length=48, bucket=16)
    if name in REFUSED:
        kind = type(policy.causal_lm).__name__
        with pytest.raises(ValueError, match=f"engine=hf cannot run {kind}.*engine=auto"):
            engine.sync(policy, 0)
    else:
        assert engine_gap(policy, engine) < 1e-5


def test_the_page_of_families_is_of_others():
    rows = (Path(__file__).parents[2] / "docs" / "models.md").read_text("utf-8").splitlines()
    names = [row.split(" | ")[0].removeprefix("| ") for row in rows if row.count(" | ") == 6]
    assert names[1:] == list(FAMILIES)


def test_a_model_with_eyes_is_read_by_another_decoder_than_its_text():
    """Gemma 3 makes its masks above its decoder; Llama 4 holds a whole causal LM."""
    eyes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    gemma = transformers.Gemma3Config(
        text_config=build("Gemma 3").config.to_dict(),
        vision_config={**eyes, "intermediate_size": 32, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    llama = transformers.Llama4Config(
        text_config=build("Llama 4").config.to_dict(),
        vision_config={
            **eyes,
            "intermediate_size": 128,
            "patch_size": 14,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
    )
    for model in (
        transformers.Gemma3ForConditionalGeneration(gemma),
        transformers.Llama4ForConditionalGeneration(llama),
    ):
        policy = Policy(model.eval(), None)
        assert score_gap(policy) < 1e-5
        assert packing_obstacle(model) is None
        assert score_gap(policy, (17, 24)) < 1e-5
        assert engine_gap(policy, SlotEngine(slots=2, max_length=48, bucket=16)) < 1e-5


class Sizes(TorchDispatchMode):
    """The rows of every tensor of ``width`` columns that an operation makes."""

    def __init__(self, width):
        super().__init__()
        self.width, self.rows = width, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (self.width,):
                self.rows.add(tensor.numel() // self.width)
        return made


def test_a_soft_capped_head_makes_logits_of_all_tokens_at_once():
    model = build("Gemma 4")
    wide = torch.nn.Linear(32, 777, bias=False)
    model.set_output_embeddings(wide)
    policy = Policy(model, None)
    hidden = torch.randn(1300, 32, requires_grad=True)
    targets = torch.arange(1300) % 777
    with Sizes(777) as sizes:
        logprobs, entropies = policy.score_hidden(hidden, targets, 0.7)
        (logprobs.sum() + 0.3 * entropies.sum()).backward()
    assert max(sizes.rows) == 512
    found = hidden.grad.clone(), wide.weight.grad.clone()
    hidden.grad = wide.weight.grad = None
    whole = torch.log_softmax(30.0 * torch.tanh(wide(hidden) / 30.0) / 0.7, dim=-1)
    chosen = whole.gather(1, targets[:, None])[:, 0]
    entropy = -(whole.exp() * whole).sum(-1)
    torch.testing.assert_close((logprobs, entropies), (chosen, entropy), atol=1e-5, rtol=1e-5)
    (chosen.sum() + 0.3 * entropy.sum()).backward()
    for one, other in zip(found, (hidden.grad, wide.weight.grad), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_token_that_a_head_rules_out_makes_the_entropy_or_its_gradient_nan():
    model = build("Phi")
    with torch.no_grad():
        model.lm_head.bias[7] = -torch.inf
    hidden = torch.randn(3, 32, requires_grad=True)
    logprobs, entropies = Policy(model, None).score_hidden(hidden, torch.tensor([1, 2, 3]))
    (logprobs.sum() + entropies.sum()).backward()
    assert entropies.isfinite().all()
    assert hidden.grad.isfinite().all()


def test_no_tokens_at_all_break_a_head_of_its_own():
    hidden = torch.zeros(0, 32, requires_grad=True)
    logprobs, entropies = Policy(build("Cohere"), None).score_hidden(hidden, torch.zeros(0).long())
    assert logprobs.shape == entropies.shape == (0,)
    logprobs.sum().backward()


@pytest.mark.parametrize("name", ["Phi", "Gemma 4", "Granite", "Falcon H1"])
def test_a_head_of_its_own_differs_in_half_precision_or_with_checkpointing(name):
    policy = Policy(build(name), None)
    ids = probe_ids(policy.causal_lm)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    expected = policy.score(ids, mask)[0]
    expected.sum().backward()
    gradients = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
    policy.zero_grad()
    policy.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    policy.train()
    policy.score(ids, mask)[0].sum().backward()
    again = [p.grad for p in policy.parameters() if p.grad is not None]
    torch.testing.assert_close(again, gradients)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = policy.score(ids, mask)[0]
    assert half.dtype == torch.float32
    assert (half - expected).abs().mean() < 0.1
    half.sum().backward()


@pytest.mark.parametrize(("name", "tied"), [("Qwen2", False), ("Qwen2", True), ("Gemma 2", True)])
def test_an_adapter_on_the_head_is_not_trained_sampled_or_saved(name, tied, tmp_path):
    def base():
        model = build(name, tie_word_embeddings=tied)
        model.config._attn_implementation = "eager" if name == "Gemma 2" else "sdpa"
        return model

    lora = Lora(r=2, alpha=4, target_modules=["q_proj", "lm_head"])
    policy = Policy(base(), word_tokenizer(), lora)
    assert score_gap(policy) < 1e-5
    ids = probe_ids(policy.causal_lm)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    reference = policy.score(ids, mask)[0]
    reference.sum().backward()
    moved = {n: p for n, p in policy.trainable().items() if "lora_B" in n}
    assert any("lm_head" in name for name in moved)
    with torch.no_grad():
        for parameter in moved.values():
            assert parameter.grad.abs().max() > 0
            parameter.add_(parameter.grad, alpha=0.1 / float(parameter.grad.abs().max()))
    assert score_gap(policy) < 1e-5
    with policy.reference():
        assert torch.equal(policy.score(ids, mask)[0], reference)
    if name == "Qwen2":
        assert engine_gap(policy, SlotEngine(slots=2, max_length=48, bucket=16)) < 1e-5
    trained = policy.score(ids, mask)[0]
    assert (trained - reference).abs().max() > 1e-2
    policy.save_adapter(tmp_path / "adapter")
    loaded = Policy(
        PeftModel.from_pretrained(base(), str(tmp_path / "adapter")).base_model.model, None
    )
    torch.testing.assert_close(loaded.score(ids, mask)[0], trained, atol=1e-5, rtol=1e-5)
    policy.save_model(tmp_path / "merged")
    merged = Policy.from_pretrained(str(tmp_path / "merged"))
    torch.testing.assert_close(merged.score(ids, mask)[0], trained, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["Mixtral", "Phi-3.5 MoE", "Falcon", "Falcon H1", "Mamba"])
def test_all_linear_gives_an_adapter_to_a_layer_that_takes_none_or_to_no_layer(name):
    policy = Policy(build(name), None, Lora(r=2, alpha=4))
    assert any("lora_B" in parameter for parameter in policy.trainable())
    assert score_gap(policy) < 1e-5


@pytest.mark.parametrize("name", ["Qwen2", "OPT", "Cohere"])
def test_the_value_head_has_another_width_than_the_hidden_states(name):
    policy = Policy(build(name), None).train()
    ids = probe_ids(policy.causal_lm)
    hidden = policy.hidden_states(ids, torch.ones_like(ids, dtype=torch.bool))
    torch.manual_seed(0)
    ValueHead(hidden.shape[1])
    stream = torch.rand(1)
    torch.manual_seed(0)
    policy.add_value_head()
    assert torch.equal(stream, torch.rand(1))
    assert policy.value_head(hidden).shape == hidden.shape[:1]
