"""Checks of a composed config: all its problems are raised at once, before anything starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf


class ConfigError(ValueError):
    """A config that cannot run; the message lists every problem with the override that mends it."""


_AT_LEAST_ONE = (
    "iterations",
    "iterations_per_epoch",
    "tasks_per_iteration",
    "group_size",
    "max_turns",
    "max_new_tokens",
    "max_context",
    "concurrency",
    "collection_rounds",
    "update_epochs",
    "num_minibatches",
    "micro_batch_tokens",
    "policy.warm_start.demonstrations",
    "policy.warm_start.epochs",
    "policy.warm_start.batch_tokens",
)
# What other numbers have to be, in words and as a test.
_NUMBERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("> 0", lambda value: value > 0),
    "eval_temperature": (">= 0", lambda value: value >= 0),
    "max_grad_norm": ("> 0", lambda value: value > 0),
    "overlap_share": ("from 0 to 1, e.g. overlap_share=0.5", lambda value: 0 <= value <= 1),
    "anchor_similarity": ("in (0, 1], e.g. 0.9", lambda value: 0 < value <= 1),
    "policy.warm_start.lr": ("> 0", lambda value: value > 0),
}
_CHOICES = {
    "memory": ("window", "transcript"),
    "stage": ("train", "warm_start", "check"),
    "action": ("free", "constrained"),
    "packing": ("auto", "packed", "padded"),
    "profile": (False, True),
    "preflight": ("auto", True, False, "only"),
    "strict": (False, True),
    "rollout_journal": (False, True),
}
# The groups whose option custom.yaml leaves the class to a person.
_CUSTOM = {
    "datamodule": "MyDataModule",
    "advantage": "MyEstimator",
    "modulation": "MyModulation",
    "loss": "MyLoss",
}
# Whose settings an algorithm changes.
_OF_CLIPPED_LOSS = ("dapo", "drgrpo", "grpopp", "gspo")
_ESTIMATORS = {"dapo": ("GRPO",), "drgrpo": ("GRPO", "GiGPO")}


def check_config(cfg: DictConfig) -> None:
    """Raise `ConfigError` with every problem of ``cfg`` that shows without building anything."""
    problems = _common_problems(cfg)
    problems += [
        f"{name}={value!r}: a number {wanted}"
        for name, (wanted, fits) in _NUMBERS.items()
        if not _is_number(value := OmegaConf.select(cfg, name, default=1)) or not fits(value)
    ]
    precision = OmegaConf.select(cfg, "trainer.precision")
    if str(precision) in ("16", "16-mixed"):
        problems.append(
            f"trainer.precision={precision} needs a scaled loss, and this loop scales none: type "
            "trainer.precision=bf16-mixed, or trainer.precision=32-true"
        )
    problems += _combination_problems(cfg)
    if not problems and cfg.max_context <= cfg.max_new_tokens:
        problems.append(
            f"max_context={cfg.max_context} leaves no room for a prompt beside "
            f"max_new_tokens={cfg.max_new_tokens}: type max_context={4 * cfg.max_new_tokens}"
        )
    if cfg.policy.model is None and not cfg.policy.warm_start.required:
        problems.append("policy.model=null: type policy.model=<hub name or folder>, or policy=tiny")
    problems += [
        f"{group}=custom: whose? type {group}._target_=my_package.{name}, the class of an "
        "importable module"
        for group, name in _CUSTOM.items()
        if OmegaConf.is_missing(cfg[group], "_target_")
    ]
    refuse(problems)


def refuse(problems: Sequence[str]) -> None:
    """Raise `ConfigError` with all ``problems``, where there are any."""
    if problems:
        raise ConfigError("\n  - ".join(["The config has problems:", *problems]))


def _combination_problems(cfg: DictConfig) -> list[str]:
    """Parts that are right by themselves, and make no sense together."""
    advantage, modulation, loss, covariance = (
        str(OmegaConf.select(cfg, f"{part}._target_")).rpartition(".")[2]
        for part in ("advantage", "modulation", "loss", "loss.covariance")
    )
    problems = []
    if advantage not in _ESTIMATORS.get(cfg.algorithm, (advantage,)):
        problems.append(
            f"algorithm={cfg.algorithm} sets what GRPO's advantage has, and {advantage} has not: "
            "type advantage=grpo, or another algorithm, e.g. algorithm=gigpo for GiGPO"
        )
    if cfg.algorithm in _OF_CLIPPED_LOSS and loss != "ClippedLoss":
        problems.append(
            f"algorithm={cfg.algorithm} sets what the clipped loss has, and {loss} is another "
            "loss: type algorithm=grpo, or another one that leaves the loss as it is"
        )
    if advantage == "PPO" and modulation in ("EMPG", "Stacked"):
        problems.append(
            "modulation=empg adds to the advantage of a response, and PPO has one a token: type "
            "modulation=aem or modulation=none, or another algorithm"
        )
    if _chosen(cfg, "algorithm") == "empg" and modulation not in ("EMPG", "Stacked"):
        given = _chosen(cfg, "modulation")
        problems.append(
            f"algorithm=empg is a modulation of GRPO, and modulation={given} takes its place: type "
            f"modulation=empg_aem for AEM on top of it, or algorithm=grpo modulation={given}"
        )
    if covariance != "None" and OmegaConf.select(cfg, "loss.ratio") == "sequence":
        problems.append(
            "loss.covariance treats single tokens, and loss.ratio=sequence (algorithm=gspo) has "
            "one ratio for all tokens of a response: type loss=clipped, or loss.ratio=token"
        )
    if covariance == "KLCov" and cfg.update_epochs == cfg.num_minibatches == 1:
        problems.append(
            "loss=kl_cov does nothing before the second optimizer step of an iteration, and "
            "update_epochs=1 num_minibatches=1 makes one: type num_minibatches=2"
        )
    if cfg.get("strict") and OmegaConf.select(cfg, "callbacks.learning") is None:
        problems.append(
            "strict=true ends a run by the verdict of callbacks.learning, which is left out: type "
            "strict=false, or callbacks=default"
        )
    if cfg.group_size == 1 and cfg.collection_rounds != 1:
        problems.append(
            f"collection_rounds={cfg.collection_rounds} replaces groups whose copies all earned "
            "the same, and with group_size=1 that is every group: type group_size=8, or "
            "collection_rounds=1"
        )
    return problems


def _chosen(cfg: DictConfig, group: str) -> str | None:
    """The option of ``group`` that a command or an experiment chose; Hydra's part of a config."""
    hydra = HydraConfig.get() if HydraConfig.initialized() else cfg.get("hydra")
    option = None if hydra is None else hydra.runtime.choices.get(group)
    return None if option is None else str(option)


def check_api_config(cfg: DictConfig) -> None:
    """The same for ``policy=api``; the endpoint checks its own options."""
    problems = _common_problems(cfg)
    value = cfg.temperature
    if value is not None and not (_is_number(value) and value >= 0):
        problems.append(f"temperature={value!r}: a number >= 0, or null for the endpoint's own")
    refuse(problems)


def _common_problems(cfg: DictConfig) -> list[str]:
    """Problems of those options that ``cfg`` has."""
    problems = [
        f"{key} is not given: type {key}=..."
        for key in sorted(OmegaConf.missing_keys(cfg.datamodule) - {"datamodule._target_"})
    ]
    problems += [
        f"{name}={value!r}: a whole number of at least 1, e.g. {name}=8"
        for name in _AT_LEAST_ONE
        if type(value := OmegaConf.select(cfg, name, default=1)) is not int or value < 1
    ]
    problems += [
        f"{name}={cfg[name]!r}: allowed are {', '.join(f'{name}={choice}' for choice in choices)}"
        for name, choices in _CHOICES.items()
        if name in cfg and cfg[name] not in choices
    ]
    if type(cfg.history_length) is not int or cfg.history_length < 0:
        problems.append(f"history_length={cfg.history_length!r}: a whole number >= 0")
    return problems


def _is_number(value: object) -> bool:
    return type(value) in (int, float)  # a bool is none
