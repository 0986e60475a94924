"""A checkpoint is data: what its stored config may make, and what a person has to type again.

Hydra calls whatever a ``_target_`` names. In a config that came with a file, that has to be a part
of this project (or torch's optimizers and schedules, and Lightning's Trainer); anything else is
made where a person has typed it: for this evaluation, or for a run of this process.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from aem_lightning.runner.checks import ConfigError
from aem_lightning.runner.schema import leaves

OURS = (
    "aem_lightning.algorithms.",
    "aem_lightning.analysis.keep.",
    "aem_lightning.datamodules.",
    "aem_lightning.envs.adapters.",
    "aem_lightning.envs.verifiers_env.",
    "aem_lightning.rollout.",
)
# Of a run, never of its evaluation, which has callbacks and loggers of its own.
LEFT_OUT = ("callbacks", "logger")
_typed: set[tuple[str, str]] = set()


def literal(stored: Any) -> Any:
    """``stored`` with texts that stay what they are: no ``${...}`` in them is looked up."""
    if isinstance(stored, Mapping):
        return {key: literal(value) for key, value in stored.items()}
    if isinstance(stored, list | tuple):
        return [literal(value) for value in stored]
    if isinstance(stored, str):  # OmegaConf's escape: every backslash before it is doubled
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", stored)
    return stored


def remember(cfg: DictConfig) -> None:
    """What ``cfg`` makes was typed by the person who runs this process."""
    _typed.update(_foreign(cfg))


def typed_again(cfg: DictConfig) -> list[str]:
    """What to type to evaluate a checkpoint of the run ``cfg``: nothing, or one word."""
    words = [f"{key}={value}" for key, value in _foreign(cfg)]
    return [_as_override(words)] if words else []


def _as_override(words: Iterable[str]) -> str:
    """``words`` as one override; Hydra wants quotes around an equals sign inside a list."""
    return f"overrides=[{','.join(map(json.dumps, words))}]"


def check_trusted(cfg: DictConfig, overrides: Collection[str]) -> None:
    """Raise where the stored config ``cfg`` asks for what nobody has typed.

    Args:
        cfg: It, ``overrides`` included.
        overrides: What was typed, as ``key=value``.

    Raises:
        ConfigError: It names keys and targets, and what to type where they are trusted.
    """
    typed = {*_foreign(OmegaConf.from_dotlist(list(overrides))), *_typed}
    strange = [entry for entry in _foreign(cfg) if entry not in typed]
    if strange:
        listed = "".join(f"\n  - {key}={value}" for key, value in strange)
        words = [*overrides, *(f"{key}={value}" for key, value in strange)]
        raise ConfigError(
            f"The checkpoint's config asks for what is no part of aem_lightning:{listed}\nA file "
            "may ask for anything. Where you trust this one, type the same again: "
            f"'{_as_override(words)}'"
        )


def _foreign(cfg: DictConfig) -> Iterator[tuple[str, str]]:
    """Keys and values that are more than data, where they are not this project's own."""
    plain = OmegaConf.to_container(cfg)
    assert isinstance(plain, dict)
    for key, value in leaves({str(k): v for k, v in plain.items() if k not in LEFT_OUT}):
        name = key.rpartition(".")[2]
        if key.endswith(".hosts.0"):  # who are given a token; all of them are one word
            whole = key.removesuffix(".0")
            yield whole, f"[{','.join(map(str, OmegaConf.select(cfg, whole)))}]"
        if (
            (name == "_target_" and not _is_ours(key, value))
            or (name == "allow_unsafe" and value not in (None, False))
            or "_args_" in key.split(".")  # past the checks of names
        ):
            yield key, str(value)


def _is_ours(key: str, target: Any) -> bool:
    """Whether ``target`` is a class of the parts of this project, and not only reached from it."""
    if key == "trainer._target_" and target == "lightning.pytorch.Trainer":
        return True
    if not isinstance(target, str) or not target.startswith((*OURS, "torch.optim.")):
        return bool(target == "???")
    try:
        found = get_object(target)
    except Exception:  # there is no such thing
        return False
    home = getattr(found, "__module__", "") + "."
    return isinstance(found, type) and str(home).startswith((*OURS, "torch.optim."))
