"""A PEFT folder is data: what it may ask for, and which model it belongs to; read without torch."""

from __future__ import annotations

import filecmp
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aem_lightning.runner.checks import ConfigError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# Arguments of peft.LoraConfig that say what the adapter is.
_LORA = frozenset(
    {
        *("r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"),
        *("layers_to_transform", "layers_pattern", "target_parameters", "modules_to_save"),
        *("trainable_token_indices", "fan_in_fan_out", "bias", "lora_bias"),
        *("use_rslora", "use_dora", "ensure_weight_tying"),
    }
)
# What is written beside them, and not read: how it was trained, and names of code (auto_mapping).
_UNREAD = frozenset(
    {
        *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode"),
        *("peft_version", "lora_dropout", "init_lora_weights", "auto_mapping"),
        *("megatron_core", "qalora_group_size"),  # nothing without the switches, which are refused
    }
)
# Such starts change the base model too, so that the adapter alone is not the whole of it.
_CHANGE_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


@dataclass(frozen=True)
class AdapterFolder:
    """A LoRA adapter as PEFT writes it.

    Attributes:
        folder: Where it is.
        base: The model that it was trained on, by its own words.
        lora: Arguments of ``peft.LoraConfig``, plain data.
    """

    folder: Path
    base: str | None
    lora: Mapping[str, Any]

    @property
    def rank(self) -> int:
        """The largest rank in it: what a server has to be started for."""
        ranks = [self.lora["r"], *(self.lora.get("rank_pattern") or {}).values()]
        return max(map(int, ranks))

    def base_model(self, typed: str | None) -> str:
        """The model to load: the one that was ``typed``, else the adapter's own.

        Raises:
            ConfigError: The adapter belongs to another model than ``typed``, or names none.
            FileNotFoundError: The adapter's own is no longer where it was.
        """
        if typed is not None:
            if self.base and _differ(typed, self.base):
                raise ConfigError(
                    f"adapter={self.folder} was trained on {self.base}, and policy.model={typed} "
                    "is another model. Leave policy.model out; or, where the adapter is meant to "
                    f"be played on it, change base_model_name_or_path in its {CONFIG}"
                )
            return typed
        if not self.base:
            raise ConfigError(
                f"adapter={self.folder}: its {CONFIG} does not name a model "
                "(base_model_name_or_path). Type policy.model=<hub name or folder>"
            )
        if is_path(self.base) and not os.path.isdir(Path(self.base).expanduser()):
            raise FileNotFoundError(
                f"adapter={self.folder}: the model that it was trained on, {self.base}, is not "
                "there. Type policy.model=<where that model is now>"
            )
        return self.base

    def is_known_to_fit(self, typed: str) -> bool:
        """Whether ``typed`` can be seen from here to be the model that it was trained on."""
        return self.base is not None and _differ(typed, self.base) is False


def read_adapter(name: str) -> AdapterFolder:
    """The adapter in the folder ``name``; of its config nothing is made.

    Raises:
        ConfigError: It is no LoRA adapter in safetensors, or asks for more than that.
        FileNotFoundError: There is no such folder, or no adapter in it.
    """
    folder = Path(name).expanduser()
    if not os.path.isdir(folder):
        raise FileNotFoundError(
            f"adapter={name}: there is no such folder. Give one that PEFT's save_pretrained wrote, "
            "e.g. adapter=logs/<name>/<time>/adapter; one on the hub is fetched by\n"
            "  hf download <owner>/<name> --local-dir <folder>"
        )
    if not (folder / CONFIG).is_file():
        is_model = (folder / "config.json").is_file()
        hint = f"It is a model: type policy.model={name}" if is_model else "Give a PEFT folder"
        raise FileNotFoundError(f"adapter={name}: there is no {CONFIG} in it. {hint}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("no JSON object")
    except ValueError as error:
        raise ConfigError(f"adapter={name}: its {CONFIG} cannot be read: {error}") from None
    if problem := _problem(config):
        raise ConfigError(
            f"adapter={name}: {problem}. Merge it into its model where it was made "
            "(merge_and_unload, then save_pretrained), and type policy.model=<the folder>"
        )
    if not (folder / WEIGHTS).is_file():
        raise ConfigError(
            f"adapter={name}: there is no {WEIGHTS} in it, and other files of weights may hold "
            "code. Save it again with save_pretrained(folder, safe_serialization=True)"
        )
    base = config.get("base_model_name_or_path")
    lora = {name: value for name, value in config.items() if name in _LORA}
    return AdapterFolder(folder, base if isinstance(base, str) and base else None, lora)


def is_path(model: str) -> bool:
    """Whether ``model`` can only be a folder: a name on the hub is ``name`` or ``owner/name``."""
    return model.startswith(("/", ".", "~")) or model.count("/") > 1 or "\\" in model


def _problem(config: Mapping[str, Any]) -> str | None:
    """Why an adapter of this config is not played."""
    kind, start = config.get("peft_type"), str(config.get("init_lora_weights")).lower()
    if kind != "LORA":
        return f"peft_type={kind} in its {CONFIG}, and adapters that are played are LORA"
    ranks = config.get("rank_pattern") or {}
    for rank in (config.get("r"), *(ranks.values() if isinstance(ranks, dict) else (ranks,))):
        if type(rank) is not int or rank < 1:
            return f"a rank of {rank!r} in its {CONFIG}, where a whole number of at least 1 is due"
    if start.startswith(_CHANGE_THE_BASE):
        return f"init_lora_weights={start} changed the base model too"
    more = {k: v for k, v in config.items() if k not in _LORA | _UNREAD and v not in _OFF}
    if more:
        listed = ", ".join(f"{key}={json.dumps(value)[:80]}" for key, value in more.items())
        return f"its {CONFIG} asks for more than a LoRA: {listed}"
    return None


_OFF: tuple[Any, ...] = (None, False, {}, [], "")


def _differ(one: str, other: str) -> bool | None:
    """Whether two names are of different models; ``None`` where that cannot be seen from here."""
    places = [Path(name).expanduser() for name in (one, other)]
    if one == other or places[0] == places[1]:
        return False
    there = [os.path.isdir(place) for place in places]
    if not all(there):
        return None if any(there) or is_path(one) or is_path(other) else True
    names = [{f.name for f in p.iterdir() if f.suffix in (".safetensors", ".bin")} for p in places]
    if names[0] != names[1]:
        return True
    return not all(filecmp.cmp(places[0] / n, places[1] / n, shallow=False) for n in names[0])
