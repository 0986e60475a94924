"""The evaluation: every task of the evaluation splits once, with intervals, written as JSON."""

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

from aem_lightning.algorithms.ranks import from_all_ranks
from aem_lightning.datamodules import AgentDataModule
from aem_lightning.modules import AgentModule
from aem_lightning.runner.api import evaluate_api
from aem_lightning.runner.build import (
    build_agent,
    build_datamodule,
    build_policy,
    build_trainer,
    check_parts,
    plain,
)
from aem_lightning.runner.checkpoints import needed_checkpoint, read_checkpoint
from aem_lightning.runner.checks import TrainOptions, refuse, wrong_options
from aem_lightning.runner.early import check_evaluation
from aem_lightning.runner.folder import held
from aem_lightning.runner.report import (
    game_hashes,
    results_of,
    write_report,
    write_transcripts,
)
from aem_lightning.runner.summary import percent
from aem_lightning.runner.trust import check_trusted, literal

log = logging.getLogger(__name__)

PROGRESS = {"progress": {"_target_": "aem_lightning.callbacks.Progress"}}


@dataclass(frozen=True)
class Restored:
    """A checkpoint brought back: its file, its training run's config, and what that builds."""

    path: Path
    config: DictConfig
    module: AgentModule
    datamodule: AgentDataModule


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
    datamodule, ending = build_datamodule(trained), contextlib.ExitStack()
    try:
        policy, _ = build_policy(trained, datamodule)
        module = build_agent(trained, policy, datamodule)
        ending.callback(getattr(module.engine, "release", bool))
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"], strict=False)
        yield Restored(path, trained, module, datamodule)
    finally:
        ending.close()
        datamodule.close()


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate the checkpoint ``cfg.ckpt_path``, or ``policy=api``.

    Every episode goes into ``transcripts.jsonl``.

    Returns:
        What ``evaluation.json`` holds.
    """
    check_evaluation(cfg)
    if cfg.get("policy") == "api":
        return evaluate_api(cfg)
    with held(Path(cfg.paths.output_dir)), restored(cfg) as agent:
        trainer = build_trainer(agent.config)
        results = play_all(trainer, agent.module, agent.datamodule)
        iteration = agent.module.iteration
        transcripts = Path(cfg.paths.output_dir).absolute() / "transcripts.jsonl"
        if trainer.is_global_zero:
            write_transcripts(transcripts, agent.module.tested, iteration)
    report = {
        "checkpoint": str(agent.path),
        "iteration": iteration,
        "temperature": agent.config.eval_temperature,
        "seed": agent.config.seed,
        "games": game_hashes(agent.datamodule),
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
    module.tested = []
    trainer.test(module, datamodule=datamodule, verbose=False)
    module.tested = from_all_ranks(module.tested)
    results = results_of(module.tested, datamodule.evaluation_splits)
    if trainer.is_global_zero:
        success = " ".join(percent(results["success"]).split())
        log.info("evaluation after iteration %d: success %s", module.iteration, success)
    return results


def checked_config(cfg: DictConfig, stored: Mapping[str, Any]) -> DictConfig:
    """The config of a checkpoint with what ``cfg`` changes in it; nothing of it is made yet.

    Raises:
        ConfigError: It asks for classes that nobody has typed, or has values that cannot be.
        ValueError: An override names an unknown key.
    """
    trained = _training_config(cfg, stored)
    check_trusted(trained, cfg.overrides)
    refuse(wrong_options(trained, TrainOptions, whole=False))
    check_parts(trained)
    return trained


def _training_config(cfg: DictConfig, stored: Mapping[str, Any]) -> DictConfig:
    """The training run's config with this evaluation's wishes and folder; it shows progress."""
    older: dict[str, Any] = {"packing": "auto", "action": "free"}  # runs that lack them
    base = OmegaConf.create({**older, **literal(stored)})
    wishes: dict[str, Any] = {"seed": cfg.seed, "paths": plain(cfg.paths)}
    if cfg.temperature is not None:
        wishes["eval_temperature"] = cfg.temperature
    if cfg.splits is not None:
        wishes["datamodule"] = {"evaluation_splits": list(cfg.splits)}
    merged = OmegaConf.merge(base, wishes)
    OmegaConf.set_struct(merged, True)
    try:
        merged.merge_with_dotlist(list(cfg.overrides))
    except OmegaConfBaseException as error:
        raise ValueError(
            f"overrides={list(cfg.overrides)}: {str(error).splitlines()[0]}. "
            "Every key must be one of the training run's config: python train.py --cfg job."
        ) from error
    OmegaConf.set_struct(merged, False)
    merged.callbacks, merged.logger, merged.profile = PROGRESS, None, False
    if isinstance(merged.trainer, DictConfig):  # else an override made something else of it
        merged.trainer.enable_progress_bar = False
        merged.trainer.default_root_dir = cfg.paths.output_dir
    assert isinstance(merged, DictConfig)
    return merged
