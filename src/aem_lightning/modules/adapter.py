"""An adapter that somebody trained, put on a policy to be played."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from aem_lightning.modules.policy import Policy, load_tokenizer


def with_adapter(policy: Policy, folder: Path, weights: str, lora: Mapping[str, Any]) -> Policy:
    """The policy that the adapter in ``folder`` makes of ``policy``; nothing of it trains further.

    A tokenizer that lies beside it, with the chat template that it was trained with, takes the
    place of the model's own.

    Args:
        policy: A policy without adapters, on the model that the adapter belongs to; used up.
        folder: A PEFT folder.
        weights: Its file of weights, in safetensors.
        lora: Arguments of ``LoraConfig``.

    Raises:
        ValueError: The file is damaged, or the adapter does not fit the model.
    """
    model = policy.causal_lm
    try:
        state = load_file(folder / weights)
    except SafetensorError as error:
        raise ValueError(f"adapter={folder}: {weights} is damaged: {error}") from error
    try:
        config = LoraConfig(**lora, task_type="CAUSAL_LM", inference_mode=True)
        peft = get_peft_model(model, config)
        _check_names(peft, state)
        set_peft_model_state_dict(peft, state)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"adapter={folder} does not fit the model {model.name_or_path}: {error}. Type "
            "policy.model=<the model that it was trained on>"
        ) from error
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(str(folder)) if has_tokenizer else policy.tokenizer
    worn = Policy(model, tokenizer)
    worn.peft = peft.eval()
    worn.requires_grad_(False)
    return worn


def _check_names(peft: PeftModel, state: Mapping[str, Tensor]) -> None:
    """Raise unless ``state`` has every weight of the adapter, and none that the model lacks."""
    wanted = {
        name: tuple(value.shape)
        for name, value in get_peft_model_state_dict(peft, save_embedding_layers=False).items()
    }
    # An adapter of a model with new words brings embeddings along.
    known = {name: tuple(value.shape) for name, value in peft.state_dict().items()} | wanted
    found = {name: tuple(value.shape) for name, value in state.items()}
    lacking = sorted(wanted.items() - found.items())
    strange = sorted(found.items() - known.items())
    if lacking or strange:
        name, shape = (strange or lacking)[0]
        told = f"{name} has the shape {shape}" if strange else f"{name} is not in the file"
        if name in known and name in found:
            told = f"{name} has the shape {found[name]}, and the model wants {known[name]}"
        raise ValueError(f"{len(lacking) + len(strange)} weights differ, the first: {told}")
