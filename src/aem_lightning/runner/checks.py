"""Checks of a composed config: every problem is collected, and all are raised at once, before anything starts."""

from __future__ import annotations

from omegaconf import DictConfig


class ConfigError(ValueError):
    """A config that cannot run; the message lists every problem with the override that mends it."""


_AT_LEAST_ONE = (
    "iterations iterations_per_epoch tasks_per_iteration group_size max_turns max_new_tokens "
    "concurrency update_epochs num_minibatches micro_batch_tokens"
).split()
_CHOICES = {"memory": ("window", "transcript"), "stage": ("train", "warm_start")}


def check_config(cfg: DictConfig) -> None:
    """Raise `ConfigError` with every problem of ``cfg`` that shows without building anything."""
    problems = [
        f"{name}={cfg[name]!r}: a whole number of at least 1, e.g. {name}=8"
        for name in _AT_LEAST_ONE
        if not isinstance(cfg[name], int) or cfg[name] < 1
    ]
    problems += [
        f"{name}={cfg[name]!r}: allowed are {', '.join(f'{name}={choice}' for choice in choices)}"
        for name, choices in _CHOICES.items()
        if cfg[name] not in choices
    ]
    problems += [
        f"{name}={cfg[name]!r}: a number {'>' if strict else '>='} 0"
        for name, strict in (("temperature", True), ("eval_temperature", False), ("max_grad_norm", True))
        if not isinstance(cfg[name], int | float) or cfg[name] < 0 or (strict and cfg[name] == 0)
    ]
    if not problems and cfg.max_context <= cfg.max_new_tokens:
        problems.append(
            f"max_context={cfg.max_context} leaves no room for a prompt beside max_new_tokens={cfg.max_new_tokens}: "
            f"type max_context={4 * cfg.max_new_tokens}"
        )
    if not problems and cfg.memory == "window" and cfg.history_length < 0:
        problems.append(f"history_length={cfg.history_length}: a whole number >= 0")
    if cfg.policy.model is None and not cfg.policy.warm_start.required:
        problems.append("policy.model=null: type policy.model=<hub name or folder>, or policy=tiny")
    if problems:
        raise ConfigError("The config has problems:\n" + "\n".join(f"  - {problem}" for problem in problems))
