"""LoRA adapters in a causal LM: where they go, whether they fit, and merged into its weights."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from aem_lightning.modules.settings import Lora

FULL_PRECISION = torch.float32
SAMPLED = 256  # numbers of a frozen tensor that its digest sees
_MAMBA = ("falcon_h1", "nemotron_h")  # beside those whose name says so


def peft_config(lora: Lora, model: PreTrainedModel) -> LoraConfig:
    """PEFT's settings of ``lora`` for ``model``."""
    targets = lora.target_modules
    every = targets == "all-linear"
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=(_without_adapters(model) or None) if every else None,
        task_type="CAUSAL_LM",
    )


def _without_adapters(model: PreTrainedModel) -> list[str]:
    """Linear layers that take no adapter: all-linear would break at them.

    The routers of some families are a Linear that gives more than a product, and kernels of Mamba
    read the weight of its last layer themselves.
    """
    reads_weights = "mamba" in model.config.model_type or model.config.model_type in _MAMBA
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (
            (type(module).__module__ == type(model).__module__ and not _gives_product(module))
            or (reads_weights and name.endswith(("out_proj", "conv1d")))
        )
    ]


@torch.no_grad()
def _gives_product(layer: nn.Linear) -> bool:
    try:
        given: object = layer(layer.weight.new_zeros(1, layer.in_features))
    except Exception:  # it wants more than hidden states
        return False
    return isinstance(given, Tensor) and given.shape == (1, layer.out_features)


def check_adapters(expected: Mapping[str, torch.Size], state: Mapping[str, Tensor]) -> None:
    """Raise unless a checkpoint's ``state`` has exactly the names and shapes that are expected.

    Raises:
        ValueError: Naming the first difference.
    """
    found = {name: value.shape for name, value in state.items()}
    if dict(expected) != found:
        wrong = sorted(set(expected.items()) ^ set(found.items()), key=str)
        raise ValueError(
            f"The checkpoint's adapters do not fit this policy ({len(wrong)} differences, the "
            f"first: {wrong[0][0]} with shape {tuple(wrong[0][1])}). Use the policy and "
            "policy.lora settings that the checkpoint was trained with, and its advantage: that of "
            "algorithm=ppo has a value head of its own."
        )


def base_digest(model: nn.Module) -> str | None:
    """What tells the frozen weights of ``model`` from others: a hash of some numbers of each.

    Up to `SAMPLED` evenly spaced numbers of a tensor, in bfloat16, so that a model loaded in
    another precision is the same. ``None`` where nothing is frozen, weights are quantized or in
    float16, whose small numbers are others, or no rank has the whole of them.
    """
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    if not frozen or not all(_is_plain(parameter) for parameter in frozen.values()):
        return None
    digest = hashlib.sha256()
    for name, parameter in sorted(frozen.items()):
        numbers = parameter.detach().flatten()
        some = numbers[:: max(1, len(numbers) // SAMPLED)].to("cpu", torch.bfloat16)
        digest.update(name.encode() + some.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _is_plain(parameter: Tensor) -> bool:
    is_here = not (parameter.is_meta or isinstance(parameter, DTensor))
    return is_here and parameter.dtype in (torch.bfloat16, torch.float32, torch.float64)


def check_base(expected: str | None, was: Mapping[str, str | None] | None) -> None:
    """Raise unless a checkpoint's adapters are ``was`` trained on the weights ``expected``.

    Raises:
        ValueError: Saying on which they were.
    """
    if was and None not in (expected, was["digest"]) and was["digest"] != expected:
        raise ValueError(
            f"The checkpoint's adapters were trained on the weights of {was['name']}, and the "
            "policy's own are others: a warm start that was made anew, or another policy.model. "
            f"Type policy.model={was['name']} if it is still there (to eval.py: "
            f"'overrides=[\"policy.model={was['name']}\"]'), or train again."
        )


def merged_copy(causal_lm: PreTrainedModel) -> PreTrainedModel:
    """A float32 model with the adapters of ``causal_lm`` merged in.

    PEFT merges in place and, where weights have 4 bits, rounds the result to 4 bits again.
    """
    adapted: dict[str, Any] = {
        n: m for n, m in causal_lm.named_modules() if isinstance(m, LoraLayer)
    }
    state = {
        name: parameter.detach().to(FULL_PRECISION)
        for name, parameter in causal_lm.named_parameters(remove_duplicate=False)
        if not any(name.startswith(f"{layer}.") for layer in adapted)
    }
    for name, layer in adapted.items():
        base = layer.get_base_layer()
        base.state_dict()  # undoes the layout that bitsandbytes gives 4-bit weights to run on a CPU
        weight = dequantize_module_weight(base).detach().to(FULL_PRECISION)
        for adapter in layer.active_adapters:
            weight = weight + layer.get_delta_weight(adapter).detach()
        state[f"{name}.weight"] = weight
        if getattr(base, "bias", None) is not None:
            state[f"{name}.bias"] = base.bias.detach().to(FULL_PRECISION)
    config = copy.deepcopy(causal_lm.config)
    ends = (causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings())
    if any(isinstance(end, LoraLayer) for end in ends):
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
    config.dtype = FULL_PRECISION
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = type(causal_lm)(config)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.generation_config = causal_lm.generation_config
    return model
