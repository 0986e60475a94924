"""From YAML to objects, in one place: classes elsewhere take plain arguments, never a config."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from aem_lightning.algorithms import check_group_size
from aem_lightning.datamodules import AgentDataModule
from aem_lightning.modules import (
    AgentModule,
    Architecture,
    Lora,
    Policy,
    RolloutSettings,
    UpdateSettings,
    WarmStartSettings,
    check_dtype,
)
from aem_lightning.rollout import Prompt, PromptEncoder, RolloutEngine
from aem_lightning.rollout.shortage import in_stage
from aem_lightning.runner import ranks
from aem_lightning.runner.checks import refuse, unresolved
from aem_lightning.runner.demonstrations import fingerprint
from aem_lightning.runner.early import read_template
from aem_lightning.runner.parts import check_classes, made
from aem_lightning.runner.several import is_sharded, problems_of_ranks
from aem_lightning.runner.trainers import build_trainer as build_trainer
from aem_lightning.runner.trainers import make_trainer, precision_of, stored_dtype
from aem_lightning.runner.warm_start import (
    WarmStart,
    finished,
    run_warm_start,
    tiny_base,
    warm_start_key,
)

log = logging.getLogger(__name__)


def instantiate(node: Any, **extra: Any) -> Any:
    """What ``node._target_`` names, with plain lists and dictionaries as arguments."""
    return hydra.utils.instantiate(node, _convert_="all", **extra)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain values, fit for a checkpoint that loads with ``weights_only=True``."""
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def check_parts(cfg: DictConfig) -> None:
    """Make the parts that cost nothing, and let them go: a wrong value in them shows at once.

    That is before games are generated, a model is loaded or a warm start is run, which takes
    minutes.

    Raises:
        ConfigError: A class that is not found or not fit for its place, or an argument that it
            does not take.
        ValueError: A group too small for its estimator, or an unknown dtype.
    """
    refuse([*problems_of_ranks(cfg)])
    try:
        plain(cfg)  # as the run keeps it
    except OmegaConfBaseException as error:
        refuse([unresolved("config", error)])
    check_classes(cfg)
    check_group_size(cfg.group_size, made("advantage", cfg.advantage))
    for group in ("modulation", "loss", "rewards", "prompt", "engine"):
        made(group, cfg[group])
    check_dtype(cfg.policy.dtype)
    optimizer = made("optimizer", cfg.optimizer, [torch.zeros(1, requires_grad=True)])
    schedule = made("scheduler", cfg.scheduler, optimizer) if cfg.scheduler else None
    _step_once("optimizer", optimizer)
    if schedule is not None:
        _step_once("scheduler", schedule)
    make_trainer(cfg)


def check_server(cfg: DictConfig) -> None:
    """Ask the engine's server, where it has one, for all that the run needs, before games are made.

    Raises:
        VllmError: Why it does not fit, and the command that starts one that does.
    """
    check = getattr(made("engine", cfg.engine), "check_server", None)
    if check is not None and ranks.rank() == 0:
        check()


def _step_once(group: str, part: Any) -> None:
    """Raise where ``part`` asks for more than the agent has: a closure, or what it is to watch."""
    try:
        part.step()
    except TypeError as error:
        name = f"{type(part).__module__}.{type(part).__name__}"
        refuse([f"{group}._target_={name}: the agent calls step() with nothing. {error}"])


def build_datamodule(cfg: DictConfig) -> AgentDataModule:
    """The environment's DataModule, its tasks ready."""
    datamodule: AgentDataModule = made("datamodule", cfg.datamodule)
    datamodule.prepare_data()
    # A missing folder or an empty split must show before anything is loaded.
    for split in (datamodule.train_split, *datamodule.evaluation_splits):
        datamodule.tasks(split)
    datamodule.iterations = cfg.get("iterations")
    return datamodule


def build_prompt(cfg: DictConfig, datamodule: AgentDataModule) -> Prompt:
    """The prompt, with the environment's own tools where it calls tools and none are typed."""
    prompt: Prompt = instantiate(cfg.prompt)
    tools = datamodule.tools() if prompt.action == "tool_call" and "tools" not in cfg.prompt else ()
    return replace(prompt, tools=tools) if tools else prompt


def build_encoder(cfg: DictConfig, policy: Policy, datamodule: AgentDataModule) -> PromptEncoder:
    """Messages to token ids, for this policy's tokenizer and this environment's tools."""
    settings = {name: cfg[name] for name in ("memory", "history_length", "action")}
    # Earlier checkpoints have no such keys.
    settings["thoughts"] = cfg.policy.get("thoughts", "keep")
    kwargs = plain(cfg.policy).get("chat_template_kwargs")
    prompt = build_prompt(cfg, datamodule)
    return PromptEncoder(policy.tokenizer, prompt, **settings, chat_template_kwargs=kwargs)


def model_to_load(cfg: DictConfig) -> str | None:
    """The folder or hub name that a run begins with; ``None`` for a tiny model from nothing."""
    begin: str | None = cfg.policy.model or cfg.policy.warm_start.get("base")
    if cfg.policy.model is None and (done := finished(_warm_start_folder(cfg))) is not None:
        return str(done.folder)
    return begin


def known_policy(cfg: DictConfig) -> Policy | None:
    """The policy, or what its warm start begins with, as far as it depends on no games.

    ``None`` for a tiny model from nothing, whose vocabulary is that of the games, and where a warm
    start is done already.
    """
    if cfg.stage == "warm_start" and finished(_warm_start_folder(cfg)) is not None:
        return None
    begin = model_to_load(cfg)
    return None if begin is None else _seeded_policy(cfg, begin)


def build_policy(
    cfg: DictConfig, datamodule: AgentDataModule, known: Policy | None = None
) -> tuple[Policy, WarmStart | None]:
    """The policy with its adapters, after its warm start where it comes from one.

    Args:
        cfg: The config.
        datamodule: Where a warm start plays.
        known: What `known_policy` gave.
    """
    start = None if cfg.policy.model else warm_start(cfg, datamodule, known)
    model = cfg.policy.model if start is None else str(start.folder)
    if known is not None and (start is None or known.causal_lm.name_or_path == model):
        return known, start
    return _seeded_policy(cfg, model), start


def _seeded_policy(cfg: DictConfig, model: str) -> Policy:
    """A policy whose new adapters depend on the seed alone: not on what a warm start has drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        return load_policy(cfg, model, lora_of(cfg), sharded=is_sharded(cfg))


def lora_of(cfg: DictConfig) -> Lora:
    """The settings of the adapters."""
    return Lora(**plain(cfg.policy.lora))


def load_policy(cfg: DictConfig, model: str, lora: Lora | None, *, sharded: bool = False) -> Policy:
    """A policy from a model folder or the hub; the trainer reads the weights of a sharded one."""
    options = ("quantization", "gradient_checkpointing")
    dtype = stored_dtype(cfg, cfg.policy.dtype)
    is_slow_in_half = stored_dtype(cfg, "auto") is torch.float32
    told = "%s=%s: this processor has no unit for it; %s is faster"
    if is_slow_in_half and dtype is not torch.float32:
        log.warning(told, "policy.dtype", cfg.policy.dtype, "policy.dtype=auto")
    if is_slow_in_half and precision_of(cfg).startswith("bf16"):
        log.warning(told, "trainer.precision", cfg.trainer.precision, "trainer.precision=null")
    folder = str(Path(model).expanduser()) if model.startswith("~") else model
    with in_stage("loading the policy", "policy.quantization=nf4, or a smaller policy=..."):
        return Policy.from_pretrained(
            folder,
            lora=lora,
            dtype=str(dtype).removeprefix("torch."),
            sharded=sharded,
            chat_template=read_template(cfg.policy.chat_template),
            **{name: cfg.policy[name] for name in options},
        )


def _warm_start_folder(cfg: DictConfig) -> Path:
    """Where the result of the supervised stage lies, keyed by everything that it depends on."""
    policy_config = plain(cfg.policy)
    if not (cfg.policy.model or cfg.policy.warm_start.get("base")):
        policy_config.pop("lora")  # a tiny model is warm-started without adapters
    # Without them the key is what it was before there were any.
    if (recorded := policy_config["warm_start"].pop("demonstrations_from", None)) is not None:
        policy_config["warm_start"]["demonstrations"] = fingerprint(recorded)
    data = warm_start_data(cfg)
    if root := data.get("root"):  # one folder is one, however it was typed
        place, here = (Path(os.path.abspath(path)) for path in (root, cfg.paths.root_dir))
        data["root"] = f"./{place.relative_to(here)}" if place.is_relative_to(here) else str(place)
    key = warm_start_key(
        policy_config,
        plain(cfg.prompt),
        {name: cfg[name] for name in ("memory", "history_length")},
        _warm_start_limits(cfg),
        data,
    )
    kind = str(cfg.datamodule.get("_target_")).rpartition(".")[2].lower()
    return Path(cfg.paths.data_dir).absolute() / "warm_start" / f"{kind}_{key}"


def _warm_start_limits(cfg: DictConfig) -> dict[str, int]:
    limits = {key: cfg[key] for key in ("max_context", "max_new_tokens")}
    return limits | {"max_turns": cfg.policy.warm_start.get("max_turns") or cfg.max_turns}


def warm_start(
    cfg: DictConfig, datamodule: AgentDataModule, base: Policy | None = None
) -> WarmStart:
    """The model folder that the supervised stage leaves; it begins with ``base``, if there is one.

    One that another run has left is taken as it is.
    """
    if (done := finished(folder := _warm_start_folder(cfg))) is not None:
        return done
    settings = WarmStartSettings(**plain(cfg.policy.warm_start))
    model = cfg.policy.model or settings.base
    if base is None and model is not None:
        base = load_policy(cfg, model, lora=lora_of(cfg))
    elif base is None:
        architecture = Architecture(**plain(cfg.policy.architecture))
        base = tiny_base(datamodule, architecture, settings.seed, build_prompt(cfg, datamodule))
    trainer = {
        "accelerator": cfg.trainer.accelerator,
        "devices": 1,
        "precision": precision_of(cfg),
        "logger": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    with ranks.first_rank_first("warm start"):
        return run_warm_start(
            base,
            datamodule,
            build_encoder(cfg, base, datamodule),
            settings,
            rewards=instantiate(cfg.rewards),
            limits=_warm_start_limits(cfg),
            folder=folder,
            trainer=trainer,
        )


def warm_start_data(cfg: DictConfig) -> dict[str, Any]:
    """The part of the DataModule's config that decides which episodes the expert plays."""
    unrelated = (
        "tasks_per_iteration",
        "iterations_per_epoch",
        "validation_tasks",
        "evaluation_batch",
        "evaluation_splits",
        "workers",
        "timeout_s",
        "memory_gb",
        "pass_environment",
        "on_bad_answer",
        "seed",
        "cached_engine",
    )
    of_environment = (  # where code runs and what is kept of it
        "allow_unsafe",
        "cached",
        "hosts",
        "images_gb",
        "model_name",
        "records",
        "sandbox",
    )
    data = {name: value for name, value in plain(cfg.datamodule).items() if name not in unrelated}
    if environment := data.get("environment"):
        data["environment"] = {k: v for k, v in environment.items() if k not in of_environment}
    return data


def warn_of_window(policy: Policy, max_context: int) -> None:
    """Say so where prompts may grow longer than the model was made for."""
    window = getattr(policy.causal_lm.config, "max_position_embeddings", None)
    if window is not None and max_context > window:
        log.warning(
            "max_context=%d is more than the model's window of %d tokens: what lies beyond it is "
            "read badly. Type max_context=%d",
            max_context,
            window,
            window,
        )


def build_agent(
    cfg: DictConfig,
    policy: Policy,
    datamodule: AgentDataModule,
    engine: RolloutEngine | None = None,
) -> AgentModule:
    """The LightningModule of the run, with an ``engine`` that is there already, or a new one."""
    warn_of_window(policy, cfg.max_context)
    agent = AgentModule(
        policy,
        engine=engine or instantiate(cfg.engine),
        encoder=build_encoder(cfg, policy, datamodule),
        rewards=instantiate(cfg.rewards),
        estimator=instantiate(cfg.advantage),
        modulation=instantiate(cfg.modulation),
        loss=instantiate(cfg.loss),
        optimizer=instantiate(cfg.optimizer),
        scheduler=instantiate(cfg.scheduler),
        rollout=RolloutSettings(**_pick(cfg, RolloutSettings)),
        update=UpdateSettings(**_pick(cfg, UpdateSettings)),
        task_types=datamodule.task_types(),
        seed=cfg.seed,
        lag=cfg.get("rollout", {}).get("lag", 0),
    )
    agent.config = plain(cfg)
    return agent


def _pick(cfg: DictConfig, settings: type[RolloutSettings | UpdateSettings]) -> Mapping[str, Any]:
    # A checkpoint of an earlier version knows fewer settings.
    return {field.name: cfg[field.name] for field in fields(settings) if field.name in cfg}
