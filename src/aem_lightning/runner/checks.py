"""Checks of a composed config: all its problems are raised at once, before anything starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from aem_lightning.modules.settings import (
    Architecture,
    Asynchrony,
    Lora,
    RolloutSettings,
    UpdateSettings,
    WarmStartSettings,
)
from aem_lightning.runner.schema import ANYTHING, arguments_of, wrong_settings, wrong_value
from aem_lightning.runner.several import problems_of_ranks
from aem_lightning.types import Count, Natural, NonNegative, Places, Positive, Seed

NO_FOLDER_YET = "HydraConfig was not set"  # OmegaConf's words, before Hydra has made the run's
Group = Mapping[str, Any]
"""What an option of a config group holds; `aem_lightning.runner.parts` looks into it."""


class ConfigError(ValueError):
    """A config that cannot run; the message lists every problem with the override that mends it."""


@dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """The keys of ``configs/policy``."""

    model: str | None
    dtype: str
    quantization: Literal["nf4"] | None
    chat_template: str | None
    chat_template_kwargs: Group | None = None
    thoughts: Literal["keep", "cut"] = "keep"
    gradient_checkpointing: bool
    lora: Lora
    architecture: Architecture | None
    warm_start: WarmStartSettings


@dataclass(frozen=True, kw_only=True)
class PlayOptions:
    """What is played, in training and by ``policy=api``."""

    name: str | int
    seed: Seed
    memory: Literal["window", "transcript"]
    history_length: Natural
    tasks_per_iteration: Count
    iterations_per_epoch: Count
    datamodule: Group
    prompt: Group
    rewards: Group
    paths: Group


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RolloutSettings, UpdateSettings, PlayOptions):
    """The keys of ``configs/train.yaml``."""

    concurrency: Places | Literal["auto"] = 128  # type: ignore[assignment]  # a number in a run
    micro_batch_tokens: Count | Literal["auto"] = 16384  # type: ignore[assignment]
    stage: Literal["train", "warm_start", "check"]
    ckpt_path: str | None
    profile: bool
    profile_decode_steps: Natural = 16
    profile_micro_batches: Natural = 2
    preflight: Literal["auto", True, False, "only"] = "auto"
    strict: bool = False
    rollout_journal: bool = True
    rank_timeout_s: Positive = 1800.0
    rollout: Asynchrony = field(default_factory=Asynchrony)
    evaluate: bool
    optimized_metric: Literal["rate", "low", "score"] | None = None
    iterations: Count
    algorithm: str | None
    fast: Group | None = None
    reply_tokens: Group | None = None
    aem_scope: Literal["task", "trajectory", "batch", "anchor_state"] = "task"
    action: Literal["free", "constrained"]
    policy: PolicyOptions
    engine: Group
    advantage: Group
    modulation: Group
    loss: Group
    optimizer: Group
    scheduler: Group | None = None  # scheduler=null takes the key away
    trainer: Group
    callbacks: Group | None
    logger: Group | None


@dataclass(frozen=True, kw_only=True)
class ApiOptions(PlayOptions):
    """The keys of ``configs/policy/api.yaml``."""

    base_url: str
    model: str | None
    api_key_env: str
    concurrency: Count
    token_budget: Count | None
    timeout_s: Positive
    max_retries: Natural
    request: Group | None
    transcripts: str
    max_turns: Count
    max_new_tokens: Count
    temperature: NonNegative | None
    splits: Sequence[str] | None
    repeats: Count


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What an evaluation of a model takes beside the keys of ``configs/train.yaml``."""

    adapter: str | None = None
    repeats: Count | None = None  # once
    splits: Sequence[str] | None = None


@dataclass(frozen=True, kw_only=True)
class EvalOptions(ModelOptions):
    """The keys of ``configs/eval.yaml``."""

    ckpt_path: str | None
    run: str | int | None
    seed: Seed
    temperature: NonNegative | None
    overrides: Sequence[str]
    paths: Group


# The groups whose option custom.yaml leaves the class to a person.
_CUSTOM = {
    "datamodule": "MyDataModule",
    "advantage": "MyEstimator",
    "modulation": "MyModulation",
    "loss": "MyLoss",
}
# Whose settings an algorithm changes.
_LOSSES = {
    "dapo": ("ClippedLoss",),
    "drgrpo": ("ClippedLoss", "CISPO", "DPPO"),
    "grpopp": ("ClippedLoss",),
    "gspo": ("ClippedLoss",),
}
_ESTIMATORS = {"dapo": ("GRPO",), "drgrpo": ("GRPO", "GiGPO")}
# Options of Lightning's Trainer that a loop with its own steps and epochs has no use for.
_ELSEWHERE = {
    "gradient_clip_val": "type max_grad_norm=1.0",
    "gradient_clip_algorithm": "gradients are clipped by their norm: type max_grad_norm=1.0",
    "accumulate_grad_batches": "type a larger tasks_per_iteration=..., or num_minibatches=1",
    "max_epochs": "type iterations=..., and iterations_per_epoch=...",
    "min_epochs": "type iterations=..., and iterations_per_epoch=...",
    "max_steps": "type iterations=...",
    "min_steps": "type iterations=...",
    "fast_dev_run": "type debug=fast",
    "overfit_batches": "type tasks_per_iteration=..., and a datamodule with few tasks",
    "limit_train_batches": "type iterations_per_epoch=...",
    "limit_val_batches": "type datamodule.validation_tasks=...",
    "limit_test_batches": "type evaluate=false, or datamodule.evaluation_splits=[...]",
    "limit_predict_batches": "nothing is predicted here: leave it out",
    "val_check_interval": "type iterations_per_epoch=..., after which validation comes",
    "reload_dataloaders_every_n_epochs": "they are made anew each epoch here: leave it out",
    "barebones": "type callbacks=null logger=null",
    "callbacks": "type callbacks=..., or callbacks.<name>=null",
    "logger": "type logger=...",
    "enable_checkpointing": "type callbacks.last_checkpoint=null callbacks.best_checkpoint=null",
    "use_distributed_sampler": "the DataModule shares tasks out itself: leave it false",
}
_PRECISIONS = ("32-true", "32", "bf16-mixed", "bf16")


def check_config(cfg: DictConfig) -> None:
    """Raise `ConfigError` with every problem of ``cfg`` that shows without building anything."""
    refuse(wrong_options(cfg, TrainOptions) + _trainer_problems(cfg.get("trainer")))
    problems = [*_combination_problems(cfg), *problems_of_ranks(cfg)]
    if ".." in (parts := str(cfg.name).split("/")) or not all(part.strip() for part in parts):
        problems.append(
            f"name={cfg.name!r}: runs lie in {cfg.paths.log_dir}/<name>: type name=train"
        )
    if cfg.max_context <= cfg.max_new_tokens:
        problems.append(
            f"max_context={cfg.max_context} leaves no room for a prompt beside "
            f"max_new_tokens={cfg.max_new_tokens}: type max_context={4 * cfg.max_new_tokens}"
        )
    if cfg.policy.model is None and not cfg.policy.warm_start.required:
        problems.append(
            "policy.model=null, policy.warm_start.required=false: type policy.model=<hub name or "
            "folder>, or policy=tiny"
        )
    elif not (cfg.policy.model or cfg.policy.architecture or cfg.policy.warm_start.get("base")):
        problems.append("policy.architecture=null: no model can be made without: type policy=tiny")
    problems += [
        f"{group}=custom: whose? type {group}._target_=my_package.{name}, the class of an "
        "importable module"
        for group, name in _CUSTOM.items()
        if OmegaConf.is_missing(cfg[group], "_target_")
    ]
    refuse(problems)


def check_api_config(cfg: DictConfig) -> None:
    """The same for ``policy=api``; the endpoint checks its own options."""
    refuse(wrong_options(cfg, ApiOptions))
    if cfg.repeats > 1 and cfg.request is not None and cfg.request.get("seed") is not None:
        refuse(
            [
                f"request.seed={cfg.request.seed} repeats={cfg.repeats}: every repeat would be "
                "drawn alike. Type one of them alone"
            ]
        )


def refuse(problems: Sequence[str]) -> None:
    """Raise `ConfigError` with all ``problems``, where there are any."""
    if problems:
        raise ConfigError("\n  - ".join(["The config has problems:", *problems]))


def wrong_options(cfg: DictConfig, options: type, *, whole: bool = True) -> list[str]:
    """What is wrong with the keys of ``cfg`` that ``options`` has; other keys are let through.

    Args:
        cfg: A config; what needs the run's own folder is not looked at before there is one.
        options: A dataclass of this module, or one like it.
        whole: Keys whose field has a default have to be there too.
    """
    problems: list[str] = []
    given: dict[str, Any] = {}
    fields, _ = arguments_of(options)
    for name in fields:
        is_group = fields[name].annotation in (Group, Group | None)
        if name not in cfg.keys():  # noqa: SIM118 (`in` passes over what is broken)
            continue
        if is_group and isinstance(cfg._get_node(name), DictConfig) and cfg[name] is not None:
            given[name] = {}  # `parts` looks into it; here, whether what it refers to is there
            if name != "paths":
                resolved(cfg, name, problems)
            continue
        given[name] = resolved(cfg, name, problems)
    problems += wrong_settings(options, given, whole=whole)
    if given.get("paths") == {}:
        problems += _wrong_paths(cfg.paths)
    return problems + _not_given(cfg.datamodule) if given.get("datamodule") == {} else problems


def _wrong_paths(paths: DictConfig) -> list[str]:
    problems: list[str] = []
    for name in ("root_dir", "data_dir", "log_dir", "output_dir"):
        if name not in paths.keys():  # noqa: SIM118 (`in` passes over what is broken)
            problems.append(f"paths.{name} is not given: type +paths.{name}=...")
            continue
        found = resolved(paths, name, problems)
        if found is not None or not OmegaConf.is_interpolation(paths, name):  # not made yet
            problems += wrong_value(f"paths.{name}", found, str, default=".")
    return problems


def _not_given(datamodule: DictConfig) -> list[str]:
    """Options that a DataModule's YAML leaves to a person."""
    try:
        missing = OmegaConf.missing_keys(datamodule) - {"datamodule._target_"}
    except OmegaConfBaseException:
        return []  # it refers to what is not there: `parts` says so
    return [f"{key} is not given: type {key}=..." for key in sorted(missing)]


def resolved(cfg: DictConfig, key: str, problems: list[str]) -> Any:
    """The plain value at ``key``; what it cannot be resolved for joins ``problems``."""
    try:
        value = OmegaConf.select(cfg, key, throw_on_missing=True)
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except OmegaConfBaseException as error:
        if NO_FOLDER_YET not in str(error):
            problems.append(unresolved(key, error))
        return ANYTHING


def unresolved(key: str, error: OmegaConfBaseException) -> str:
    """What to say of a value at ``key`` that refers to what is not there."""
    return f"{error.full_key or key}: {str(error).splitlines()[0]}"


def _trainer_problems(trainer: Any) -> list[str]:
    """Options of Lightning's Trainer that this loop does not take, and what to type instead."""
    if not isinstance(trainer, DictConfig):
        return []
    problems: list[str] = []
    given = {str(name): resolved(trainer, str(name), problems) for name in trainer}
    problems += [
        f"trainer.{name}={given[name]}: not an option of this loop, which optimises by itself; "
        f"{instead}"
        for name, instead in _ELSEWHERE.items()
        if given.get(name) is not None and given[name] is not False
    ]
    precision = str(given.get("precision") or _PRECISIONS[0])  # null is one of them, later
    if precision not in _PRECISIONS:
        reason = (
            "needs a scaled loss, and this loop scales none"
            if precision.startswith("16")
            else "would round the small steps of the adapters away, or is not what they learn in"
        )
        problems.append(
            f"trainer.precision={precision} {reason}: type trainer.precision=bf16-mixed, or "
            "trainer.precision=32-true"
        )
    every = given.get("check_val_every_n_epoch", 1)
    return [*problems, *wrong_value("trainer.check_val_every_n_epoch", every, Count, 1)]


def _combination_problems(cfg: DictConfig) -> list[str]:
    """Parts that are right by themselves, and make no sense together."""
    advantage, modulation, loss, covariance = (
        _class_of(node)
        for node in (cfg.advantage, cfg.modulation, cfg.loss, cfg.loss.get("covariance"))
    )
    problems = []
    if advantage not in _ESTIMATORS.get(cfg.algorithm, (advantage,)):
        problems.append(
            f"algorithm={cfg.algorithm} sets what GRPO's advantage has, and {advantage} has not: "
            "type advantage=grpo, or another algorithm, e.g. algorithm=gigpo for GiGPO"
        )
    if loss not in _LOSSES.get(cfg.algorithm, (loss,)):
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
    acting = [
        name for name in ("horizon_growth", "task_weights") if (cfg.callbacks or {}).get(name)
    ]
    if acting and OmegaConf.select(cfg, "rollout.lag"):
        problems.append(
            f"rollout.lag=1 plays an iteration before callbacks.{acting[0]} says what is played in "
            "it: type rollout.lag=0, or callbacks=default"
        )
    dialect = OmegaConf.select(cfg, "datamodule.environment.dialect")
    action, blocks = cfg.prompt.action, "```bash" in str(cfg.prompt.opening)
    if (dialect == "bash" and action != "plain") or (dialect == "functions" and blocks):
        problems.append(
            f"datamodule.environment.dialect={dialect} does not read what the prompt asks for "
            f"(prompt.action={action}{', blocks of bash' if blocks else ''}): type prompt=swe_bash "
            "datamodule.environment.dialect=bash, or prompt=swe_functions with dialect=functions"
        )
    if cfg.group_size == 1 and cfg.collection_rounds != 1:
        problems.append(
            f"collection_rounds={cfg.collection_rounds} replaces groups whose copies all earned "
            "the same, and with group_size=1 that is every group: type group_size=8, or "
            "collection_rounds=1"
        )
    return problems


def _class_of(node: Any) -> str:
    """The name of the class that a part is of, without its module; ``None`` where it has none."""
    is_part = isinstance(node, DictConfig) and not OmegaConf.is_missing(node, "_target_")
    return str(node.get("_target_") if is_part else None).rpartition(".")[2]


def _chosen(cfg: DictConfig, group: str) -> str | None:
    """The option of ``group`` that a command or an experiment chose; Hydra's part of a config."""
    hydra = HydraConfig.get() if HydraConfig.initialized() else cfg.get("hydra")
    option = None if hydra is None else hydra.runtime.choices.get(group)
    return None if option is None else str(option)
