"""The evaluation: every task of the evaluation splits, with intervals, written as JSON."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from aem_lightning.collectives import from_all_ranks
from aem_lightning.datamodules import AgentDataModule
from aem_lightning.modules import AgentModule, Policy
from aem_lightning.modules.adapter import with_adapter
from aem_lightning.runner.adapter_folder import WEIGHTS, read_adapter
from aem_lightning.runner.api import evaluate_api
from aem_lightning.runner.build import (
    build_agent,
    build_datamodule,
    build_policy,
    check_parts,
    check_server,
    known_policy,
    load_policy,
    plain,
)
from aem_lightning.runner.checkpoints import needed_checkpoint, read_checkpoint
from aem_lightning.runner.checks import TrainOptions, refuse, wrong_options
from aem_lightning.runner.early import check_evaluation, read_template, with_base_model
from aem_lightning.runner.folder import held
from aem_lightning.runner.memory_plan import planned
from aem_lightning.runner.origin import write_origin
from aem_lightning.runner.ranks import first_rank_first
from aem_lightning.runner.report import (
    about,
    game_hashes,
    results_of,
    write_report,
    write_transcripts,
)
from aem_lightning.runner.starting import Start, check_policy
from aem_lightning.runner.summary import percent
from aem_lightning.runner.trust import check_trusted, literal

log = logging.getLogger(__name__)

PROGRESS = {"progress": {"_target_": "aem_lightning.callbacks.Progress"}}


@dataclass(frozen=True)
class Restored:
    """An agent that can play: the file or folder that it is of, its config, what that builds."""

    path: Path
    config: DictConfig
    module: AgentModule
    datamodule: AgentDataModule
    trainer: L.Trainer


@contextlib.contextmanager
def restored(cfg: DictConfig) -> Iterator[Restored]:
    """The agent of the checkpoint ``cfg.ckpt_path``; its environment workers end with the context.

    ``cfg`` has the keys of ``configs/eval.yaml``.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: The file is no checkpoint, ``ckpt_path`` is null, its config asks for classes
            that nobody has typed, or an override names an unknown key or a value that cannot be.
    """
    path = needed_checkpoint(cfg, cfg.run)
    checkpoint = read_checkpoint(path)
    trained = checked_config(cfg, checkpoint["aem_lightning"]["config"])
    check_server(trained)
    start = Start.of(trained, weights=checkpoint["state_dict"])
    with _games(trained, start) as datamodule:
        policy, _ = build_policy(trained, datamodule, start.policy)
        module = build_agent(trained, policy, datamodule, start.engine)
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"], strict=False)
        yield Restored(path, trained, module, datamodule, start.trainer)


@contextlib.contextmanager
def loaded(cfg: DictConfig) -> Iterator[Restored]:
    """The agent of a model, as it is or with an adapter; ``cfg`` is of ``configs/train.yaml``.

    Raises:
        FileNotFoundError: There is no such model or adapter.
        ValueError: The adapter does not fit the model, or the model has no chat template.
    """
    config = _showing_progress(_wished(with_base_model(cfg), cfg), cfg)
    _check_repeats(config, cfg)
    config = planned(config, trains=False)
    check_parts(config)
    check_server(config)
    adapter = cfg.get("adapter")
    start = Start.of(config, policy=_played_policy(config, adapter, cfg.policy.model))
    with _games(config, start) as datamodule:
        policy = start.policy
        if policy is None or config.policy.model is None:  # a warm start makes it
            policy, _ = build_policy(config, datamodule, policy)
        path = Path(adapter or str(policy.causal_lm.name_or_path))
        module = build_agent(config, policy, datamodule, start.engine)
        yield Restored(path, config, module, datamodule, start.trainer)


@contextlib.contextmanager
def _games(config: DictConfig, start: Start) -> Iterator[AgentDataModule]:
    """The datamodule; its workers end with the context, and the engine lets its memory go."""
    with contextlib.ExitStack() as ending:
        ending.callback(getattr(start.engine, "release", bool))
        with first_rank_first("tasks"):
            datamodule = build_datamodule(config)
        ending.callback(datamodule.close)
        yield datamodule


def _played_policy(config: DictConfig, adapter: str | None, typed: str | None) -> Policy | None:
    """The policy of a model, as far as it depends on no games."""
    # A server is given policies as adapters: new ones change nothing.
    is_served = str(config.engine.get("_target_")).endswith("VllmEngine")
    if adapter is None and (config.policy.model is None or is_served):
        return known_policy(config)
    policy = load_policy(config, config.policy.model, lora=None)
    policy.requires_grad_(False)
    if adapter is not None:
        known = read_adapter(adapter)
        if typed is not None and not known.is_known_to_fit(typed):
            told = "adapter=%s was trained on %s, which cannot be compared with policy.model=%s"
            log.warning(told, adapter, known.base, typed)
        policy = with_adapter(policy, known.folder, WEIGHTS, known.lora)
        if (template := read_template(config.policy.chat_template)) is not None:
            policy.tokenizer.chat_template = template
    return policy


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate a checkpoint, a model, or ``policy=api``.

    ``cfg`` is of ``configs/eval.yaml``; of a model it is of ``configs/train.yaml``, with
    ``adapter``, ``repeats`` and ``splits`` where these are wished for. Every episode goes into
    ``transcripts.jsonl``.

    Returns:
        What ``evaluation.json`` holds.
    """
    check_evaluation(cfg)
    if cfg.get("policy") == "api":
        return evaluate_api(cfg)
    is_run = cfg.get("policy") is None
    opened = restored if is_run else loaded
    with held(Path(cfg.paths.output_dir)), opened(cfg) as agent:
        agent.module.repeats = cfg.get("repeats") or 1
        checkpoint = agent.path if is_run else None
        report = about(agent.module, agent.config, cfg.get("adapter"), checkpoint)
        trainer, games = agent.trainer, game_hashes(agent.datamodule)
        folder = Path(cfg.paths.output_dir)
        write_origin(folder, trainer, games, name=None, seed=cfg.seed, script="eval")
        results = play_all(trainer, agent.module, agent.datamodule)
        transcripts = Path(cfg.paths.output_dir).absolute() / "transcripts.jsonl"
        if trainer.is_global_zero:
            write_transcripts(transcripts, agent.module, report["model"])
    report |= {
        "games": games,
        "transcripts": str(transcripts),
        **results,
    }
    if trainer.is_global_zero:
        write_report(Path(cfg.paths.output_dir), report, f"evaluation of {agent.path}")
    return report


def play_all(
    trainer: L.Trainer, module: AgentModule, datamodule: AgentDataModule
) -> dict[str, Any]:
    """Success over all evaluation splits together and for each, and every episode's outcome.

    ``module.tested`` then holds the episodes of all ranks.
    """
    check_agent(trainer, module)
    module.tested = []
    trainer.test(module, datamodule=datamodule, verbose=False)
    module.tested = from_all_ranks(module.tested)
    results = results_of(module.tested, datamodule.evaluation_splits, module.repeats)
    if trainer.is_global_zero:
        success = " ".join(percent(results["success"]).split())
        log.info("evaluation after iteration %d: success %s", module.iteration, success)
    return results


def check_agent(trainer: L.Trainer, module: AgentModule) -> None:
    """The self-check of the module's policy, see `check_policy`."""
    check_policy(trainer, module.policy, module.engine, module.update_settings.packing)


def checked_config(cfg: DictConfig, stored: Mapping[str, Any]) -> DictConfig:
    """The config of a checkpoint with what ``cfg`` changes in it; nothing of it is made yet.

    Raises:
        ConfigError: It asks for classes that nobody has typed, or has values that cannot be.
        ValueError: An override names an unknown key.
    """
    trained = _training_config(cfg, stored)
    check_trusted(trained, cfg.overrides)
    refuse(wrong_options(trained, TrainOptions, whole=False))
    _check_repeats(trained, cfg)
    trained = planned(trained, trains=False)
    check_parts(trained)
    return trained


def _training_config(cfg: DictConfig, stored: Mapping[str, Any]) -> DictConfig:
    """The training run's config with this evaluation's wishes and folder; it shows progress."""
    older: dict[str, Any] = {"packing": "auto", "action": "free"}  # runs that lack them
    base = OmegaConf.create({**older, **literal(stored)})
    if cfg.temperature is not None:
        base.eval_temperature = cfg.temperature
    merged = _wished(base, cfg)
    OmegaConf.set_struct(merged, True)
    try:
        merged.merge_with_dotlist(list(cfg.overrides))
    except OmegaConfBaseException as error:
        raise ValueError(
            f"overrides={list(cfg.overrides)}: {str(error).splitlines()[0]}. "
            "Every key must be one of the training run's config: python train.py --cfg job."
        ) from error
    return _showing_progress(merged, cfg)


def _check_repeats(config: DictConfig, cfg: DictConfig) -> None:
    repeats, temperature = (cfg.get("repeats") or 1), config.eval_temperature
    if repeats > 1 and temperature == 0:
        refuse(
            [
                f"repeats={repeats} at a temperature of 0, where every repeat is the same: type "
                "temperature=0.4, or repeats=1"
            ]
        )


def _wished(config: DictConfig, cfg: DictConfig) -> DictConfig:
    """A training run's config with the seed, splits and folders of the evaluation ``cfg``."""
    wishes: dict[str, Any] = {"seed": cfg.seed, "paths": plain(cfg.paths)}
    if cfg.get("splits") is not None:
        wishes["datamodule"] = {"evaluation_splits": list(cfg.splits)}
    config = config.copy()
    OmegaConf.set_struct(config, False)
    merged = OmegaConf.merge(config, wishes)
    assert isinstance(merged, DictConfig)
    return merged


def _showing_progress(config: DictConfig, cfg: DictConfig) -> DictConfig:
    """``config`` with an evaluation's callbacks and folder in the place of a training run's."""
    OmegaConf.set_struct(config, False)
    config.callbacks, config.logger, config.profile = PROGRESS, None, False
    config.stage = "train"  # its engine samples, whatever stage the experiment is of
    if isinstance(config.trainer, DictConfig):  # else an override made something else of it
        config.trainer.enable_progress_bar = False
        config.trainer.default_root_dir = cfg.paths.output_dir
    return config
