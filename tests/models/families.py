"""Tiny random models of many families, and how far the parts of this project are from their own.

Weights are drawn wide, so that biases, norms and caps matter as they do after training, and windows
are shorter than the sequences that are scored.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from aem_lightning.modules import Policy
from aem_lightning.modules.attention import packing_obstacle
from aem_lightning.rollout import Request, RolloutEngine, Sampling, SlotEngine
from aem_lightning.rollout.head import decoder_of

WINDOW = 5
VOCABULARY = 24
COMMON = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": None,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
SMALL_HEAD = {"head_dim": 16}
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
LATENT = {
    "num_key_value_heads": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_chunk_size": 8}

# name: the config's class of transformers without its ending, and what it has beside COMMON.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "Qwen2": ("Qwen2", {}),
    "Qwen2, sliding": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "Qwen3": ("Qwen3", SMALL_HEAD),
    "Qwen3 MoE": ("Qwen3Moe", {**SMALL_HEAD, **EXPERTS}),
    "Qwen3-Next": ("Qwen3Next", {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 16}),
    "Qwen3.5": ("Qwen3_5", DELTA),
    "Mistral": ("Mistral", {"sliding_window": WINDOW}),
    "Mistral, full": ("Mistral", {"sliding_window": None}),
    "Ministral": ("Ministral", {**SMALL_HEAD, **SLIDING}),
    "Mixtral": ("Mixtral", {"sliding_window": WINDOW, "num_local_experts": 2}),
    "Gemma": ("Gemma", SMALL_HEAD),
    "Gemma 2": ("Gemma2", {**SMALL_HEAD, **SLIDING, "query_pre_attn_scalar": 16}),
    "Gemma 3": ("Gemma3", {**SMALL_HEAD, **SLIDING, "query_pre_attn_scalar": 16}),
    "Gemma 4": (
        "Gemma4",
        {
            **SMALL_HEAD,
            **SLIDING,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "final_logit_softcapping": 30.0,
        },
    ),
    "VaultGemma": ("VaultGemma", {**SMALL_HEAD, **SLIDING}),
    "gpt-oss": (
        "GptOss",
        {**SMALL_HEAD, **SLIDING, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "Phi": ("Phi", {"num_key_value_heads": 2}),
    "Phi-3": ("Phi3", {"sliding_window": WINDOW}),
    "Phi-3.5 MoE": (
        "Phimoe",
        {"lm_head_bias": True, "num_local_experts": 2, "sliding_window": WINDOW},
    ),
    "Starcoder2": ("Starcoder2", {"sliding_window": WINDOW}),
    "Granite": ("Granite", {"logits_scaling": 4.0, "embedding_multiplier": 3.0}),
    "Granite MoE": ("GraniteMoe", {"logits_scaling": 4.0, "num_local_experts": 2}),
    "Granite 4": (
        "GraniteMoeHybrid",
        {
            "layer_types": ["mamba", "attention"],
            "logits_scaling": 4.0,
            "mamba_expand": 2,
            "num_local_experts": 2,
            "shared_intermediate_size": 16,
            **MAMBA,
        },
    ),
    "Cohere": ("Cohere", {}),
    "Cohere 2": ("Cohere2", SLIDING),
    "Llama 4": (
        "Llama4",
        {
            **SMALL_HEAD,
            "attention_chunk_size": WINDOW,
            "intermediate_size_mlp": 64,
            "num_local_experts": 2,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
            "moe_layers": [1],
        },
    ),
    "OLMo": ("Olmo", {}),
    "OLMo 2": ("Olmo2", {}),
    "OLMo 3": ("Olmo3", SLIDING),
    "OLMoE": ("Olmoe", {"num_experts": 2, "num_experts_per_tok": 1}),
    "SmolLM3": ("SmolLM3", {}),
    "StableLM": ("StableLm", {}),
    "Nemotron": ("Nemotron", {}),
    "GLM": ("Glm", SMALL_HEAD),
    "GLM 4": ("Glm4", SMALL_HEAD),
    "GLM 4 MoE": (
        "Glm4Moe",
        {
            **SMALL_HEAD,
            "n_routed_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
    ),
    "DeepSeek V3": (
        "DeepseekV3",
        {
            **LATENT,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
    ),
    "MiniCPM3": ("MiniCPM3", {**LATENT, "dim_model_base": 8}),
    "HyperCLOVA X": ("HyperCLOVAX", {"logits_scaling": 0.25}),
    "Ernie 4.5": ("Ernie4_5", {}),
    "Hunyuan": ("HunYuanDenseV1", SMALL_HEAD),
    "Helium": ("Helium", SMALL_HEAD),
    "Seed-OSS": ("SeedOss", SMALL_HEAD),
    "Arcee": ("Arcee", {}),
    "Apertus": ("Apertus", {}),
    "EXAONE 4": ("Exaone4", {**SLIDING, "sliding_window_pattern": None}),
    "ModernBERT decoder": (
        "ModernBertDecoder",
        {
            "bos_token_id": 1,
            "local_attention": 2 * WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "Persimmon": ("Persimmon", {"num_key_value_heads": 2}),
    "LFM2": ("Lfm2", {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}),
    "Falcon": ("Falcon", {}),
    "Falcon H1": (
        "FalconH1",
        {
            "lm_head_multiplier": 0.25,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
        },
    ),
    "Bamba": ("Bamba", {"attn_layer_indices": [1], "mamba_expand": 2, **MAMBA}),
    "Jamba": (
        "Jamba",
        {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    ),
    "Nemotron-H": (
        "NemotronH",
        {
            "layers_block_type": ["mamba", "attention"],
            **SMALL_HEAD,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "chunk_size": 8,
            "n_groups": 1,
        },
    ),
    "Mamba": ("Mamba", {"state_size": 8}),
    "GPT-2": ("GPT2", {**GPT, "scale_attn_by_inverse_layer_idx": True}),
    "GPT-J": ("GPTJ", {**GPT, "rotary_dim": 8}),
    "GPT-NeoX": ("GPTNeoX", {}),
    "CodeGen": ("CodeGen", {**GPT, "rotary_dim": 8, "num_attention_heads": 4}),
    "OPT": ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 16}),
    "Bloom": ("Bloom", {"n_head": 2, "n_layer": 2}),
    "MPT": ("Mpt", {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 64}),
    "XGLM": ("XGLM", {"d_model": 32, "num_layers": 2, "attention_heads": 2, "ffn_dim": 64}),
}
TEXT_CONFIG = {"Qwen3_5", "Gemma3", "Gemma4", "Llama4"}  # families whose config has other parts too


def build(name: str, seed: int = 1, spread: float = 0.2, **changes: Any) -> PreTrainedModel:
    """A model of the family ``name`` with random weights, in evaluation mode.

    Args:
        name: A key of `FAMILIES`.
        seed: Of the weights; the global random stream is left as it was.
        spread: Standard deviation of what is added to every weight.
        **changes: To its config.
    """
    family, more = FAMILIES[name]
    kind = f"{family}TextConfig" if family in TEXT_CONFIG else f"{family}Config"
    config = getattr(transformers, kind)(**{**COMMON, **more, **changes})
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * spread)
    return model


def models() -> Iterator[tuple[str, Callable[[], PreTrainedModel]]]:
    """Every family's name, and what builds its model."""
    for name in FAMILIES:
        yield name, functools.partial(build, name)


def probe_ids(model: PreTrainedModel, rows: int = 2, length: int = 24) -> Tensor:
    """Random token ids [rows, length], always the same, none of them a special one."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


@torch.no_grad()
def own_logprobs(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Log-probabilities [B, L - 1] of ``ids`` [B, L] from 1 on, by the model's own forward pass."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]


@torch.no_grad()
def score_gap(policy: Policy, lengths: tuple[int, int] | None = None) -> float:
    """The largest difference, in nats, of `Policy.score` from the model's own log-probabilities.

    With ``lengths``, two sequences are packed into one row.
    """
    ids = probe_ids(policy.causal_lm)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    own = own_logprobs(policy.causal_lm, ids)
    if lengths is None:
        return float((policy.score(ids, mask)[0] - own.flatten()).abs().max())
    row, inside, wanted = (
        torch.cat([x[i, :n] for i, n in enumerate(lengths)])[None] for x in (ids, mask, ids)
    )
    wanted = torch.cat([own[i, : n - 1] for i, n in enumerate(lengths)])
    return float((policy.score(row, inside, lengths=lengths)[0] - wanted).abs().max())


def engine_gap(policy: Policy, engine: RolloutEngine, turns: int = 2) -> float:
    """The largest difference, in nats, of what ``engine`` reports of its tokens.

    Three episodes of different lengths are played for some turns, so that prompts are prefilled,
    read again and gone on with, past the window.

    Raises:
        ValueError: The engine refuses the model.
    """
    engine.sync(policy, 0)
    sampling = Sampling(1.0, 8, (2,))
    ids = probe_ids(policy.causal_lm)[0].tolist()
    prompts = {f"episode {n}": ids[:n] for n in (1, 7, 18)}
    largest = 0.0
    for turn in range(turns):
        engine.submit([Request(key, p, sampling, 11 + turn) for key, p in prompts.items()])
        for result in engine.poll(wait_all=True):
            prompt = prompts[result.key]
            whole = [*prompt, *result.tokens]
            own = own_logprobs(policy.causal_lm, torch.tensor([whole]))[0, len(prompt) - 1 :]
            largest = max(largest, float((own - torch.tensor(result.logprobs)).abs().max()))
            prompts[result.key] = [*whole, 9, 4]
    for key in prompts:
        engine.close(key)
    return largest


def head_of(policy: Policy) -> str:
    """What comes after the product with the head's weight, measured on hidden states."""
    if policy.head.weight is not None:
        return "product"
    weight = policy.causal_lm.get_output_embeddings().weight
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(4, weight.shape[1], generator=generator)
    with torch.no_grad():
        logits = policy.head.logits
        bias, product = logits(torch.zeros_like(hidden)), hidden @ weight.T
        near = (logits(hidden * 1e-2) - bias) * 100
        far = (logits(hidden * 1e3) - bias) / 1e3
    scale = float((near / product).median())
    if not torch.allclose(near, scale * product, rtol=1e-2, atol=1e-2 * abs(scale)):
        return "layers of its own"
    parts = ["product", *([f"× {scale:.3g}"] if abs(scale - 1) > 1e-3 else [])]
    parts += ["+ bias"] if bias.abs().max() > 0 else []
    parts += ["soft cap"] if far.abs().max() < 0.5 * (scale * product).abs().max() else []
    return " ".join(parts)


def attention_of(model: PreTrainedModel) -> str:
    """The kinds of a model's layers, and what else its attention has."""
    config = decoder_of(model).config
    default = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    kinds = dict.fromkeys(getattr(config, "layer_types", None) or [default])
    parts = [kind.removesuffix("_attention") for kind in kinds]
    parts += ["soft cap"] if getattr(config, "attn_logit_softcapping", None) else []
    names = [name for name, _ in model.named_parameters()]
    return ", ".join([*parts, *(["sinks"] if any("sinks" in name for name in names) else [])])


def sampled(name: str) -> tuple[str, str]:
    """The engine that ``engine=auto`` takes for a family, and its gap."""
    knows_plain = "cache" in inspect.signature(SlotEngine).parameters
    for engine, options in (("hf", {}), *([("plain", {"cache": "plain"})] if knows_plain else [])):
        policy = Policy(build(name), None)
        try:
            gap = engine_gap(policy, SlotEngine(slots=3, max_length=64, bucket=16, **options))
        except ValueError:
            continue
        return engine, f"{gap:.0e}"
    return "refused", "–"


def page() -> str:
    """A line a family: its head, its attention, and the gaps."""
    lines = [
        "## Families",
        "",
        f"Tiny models of {len(FAMILIES)} families with random weights, two layers and, where they"
        f" have one, a window of {WINDOW} tokens, under sequences of up to 40. The largest gap of a"
        " token's log-probability, in nats, from the log-softmax of the logits that the model gives"
        " by itself: of `Policy.score` over padded and over packed rows (–: `packing=auto` pads),"
        " and of what the engine reports that `engine=auto` takes.",
        "",
        "| family | head | attention | score | packed | engine | its gap |",
        "|---|---|---|---:|---:|---|---:|",
    ]
    for name in FAMILIES:
        policy = Policy(build(name), None)
        obstacle = packing_obstacle(policy.causal_lm)
        packed = "–" if obstacle else f"{score_gap(policy, (17, 24)):.0e}"
        cells = [name, head_of(policy), attention_of(policy.causal_lm)]
        cells += [f"{score_gap(policy):.0e}", packed, *sampled(name)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
