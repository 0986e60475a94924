"""What can be known of a model before it is there: from a folder, the hub's config, or its name."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

# Shapes of models that configs and docs name, in the words of transformers' configs: enough to plan
# with where none of their files is at hand.
_QWEN2 = {"vocab_size": 151936, "tie_word_embeddings": True}
_LARGE = {"vocab_size": 152064, "tie_word_embeddings": False}


def _shape(hidden: int, wide: int, layers: int, heads: int, shared: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
    }


_QWEN3 = {"head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False}
SHAPES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "qwen2.5-0.5b": ("qwen2", _shape(896, 4864, 24, 14, 2) | _QWEN2),
    "qwen2.5-1.5b": ("qwen2", _shape(1536, 8960, 28, 12, 2) | _QWEN2),
    "qwen2.5-3b": ("qwen2", _shape(2048, 11008, 36, 16, 2) | _QWEN2),
    "qwen2.5-7b": ("qwen2", _shape(3584, 18944, 28, 28, 4) | _LARGE),
    "qwen2.5-14b": ("qwen2", _shape(5120, 13824, 48, 40, 8) | _LARGE),
    "qwen2.5-32b": ("qwen2", _shape(5120, 27648, 64, 40, 8) | _LARGE),
    "qwen2.5-72b": ("qwen2", _shape(8192, 29568, 80, 64, 8) | _LARGE),
    "qwen3-8b": ("qwen3", _shape(4096, 12288, 36, 32, 8) | _QWEN3),
    "qwen3-14b": (
        "qwen3",
        _shape(5120, 17408, 40, 40, 8) | _QWEN3,
    ),
    "qwen3-32b": (
        "qwen3",
        _shape(5120, 25600, 64, 64, 8) | _QWEN3,
    ),
}
_VARIANTS = ("-instruct", "-base", "-chat", "-coder")


def config_of(model: str) -> Any | None:
    """The config of a model in a folder, in the hub's cache, among `SHAPES`, or on the hub.

    A config is a few kilobytes; nothing else is fetched. ``None`` where it is in none of them.
    """
    from transformers import AutoConfig  # heavy

    folder = os.path.expanduser(model)
    options = {"trust_remote_code": False}
    for is_local in (True, False):
        try:
            return AutoConfig.from_pretrained(folder, local_files_only=is_local, **options)
        except (OSError, ValueError):
            if is_local and (known := _known(model)) is not None:
                kind, shape = known
                return AutoConfig.for_model(kind, **shape)
    return None


def _known(model: str) -> tuple[str, Mapping[str, Any]] | None:
    name = model.rpartition("/")[2].lower()
    for variant in _VARIANTS:
        name = name.replace(variant, "")
    return SHAPES.get(name)


def parameters_by_name(model: str) -> int | None:
    """How many parameters a model's name tells, mixtures by all of their experts.

    Example:
        >>> parameters_by_name("meta-llama/Llama-3.1-70B-Instruct"), parameters_by_name("a/Small")
        (70000000000, None)
        >>> parameters_by_name("mistralai/Mixtral-8x7B-v0.1"), parameters_by_name("a/b-360M")
        (56000000000, 360000000)
    """
    name = model.rpartition("/")[2]
    found = re.search(
        r"(?<![\w.])(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", name, re.IGNORECASE
    )
    if found is None:
        return None
    experts, size, unit = found.groups()
    return int(int(experts or 1) * float(size) * {"b": 10**9, "m": 10**6}[unit.lower()])
