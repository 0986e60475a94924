"""Small runs on the toy environment, composed from the project's own configs."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from aem_lightning.modules import AgentModule
from aem_lightning.runner.build import (
    build_agent,
    build_datamodule,
    build_policy,
    build_trainer,
    warm_start,
)
from aem_lightning.runner.cli import accept_plus
from aem_lightning.types import Iteration

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
# Of a real command: it finds the package and the toy environment, and computes on one thread.
COMMAND_ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")]),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}

# The quickstart with the toy environment: real overrides, fit for a command line.
COIN = (
    "experiment=quickstart",
    "datamodule=coin",
    f"hydra.searchpath=[file://{ROOT / 'tests' / 'configs'}]",
)
SMALL = (
    "policy.architecture.hidden_size=32",
    "policy.architecture.intermediate_size=64",
    "policy.architecture.num_hidden_layers=2",
    "policy.architecture.num_attention_heads=2",
    "policy.architecture.num_key_value_heads=1",
    "policy.lora.r=4",
    "policy.warm_start.demonstrations=64",
    "policy.warm_start.epochs=12",
    "policy.warm_start.lr=1e-2",
    "policy.warm_start.batch_tokens=512",
    "trainer.accelerator=cpu",
)
SHORT = (
    "iterations=4",
    "iterations_per_epoch=2",
    "tasks_per_iteration=4",
    "group_size=4",
    "max_turns=4",
    "max_new_tokens=6",
    "max_context=128",
    "concurrency=16",
)


def toy_overrides(folder: Path, model: str | None = None) -> list[str]:
    """Overrides of a run of a second or two below ``folder``, from the warm-started ``model``."""
    places = [f"paths.root_dir={folder}"]
    if model is not None:
        places.append(f"policy.model={model}")
    return [*COIN, *SMALL, *SHORT, *places]


def composed(overrides: list[str], config: str = "train") -> DictConfig:
    """The config that the command line would give, with a fixed output folder."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(config, overrides=accept_plus(overrides))


def toy_config(folder: Path, model: str | None, *overrides: str) -> DictConfig:
    """The config of a small run whose output folder is ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    output = f"paths.output_dir={folder}"
    return composed([*toy_overrides(folder, model), output, *overrides])


def process(
    *arguments: str,
    cwd: Path = ROOT,
    env: Mapping[str, str] = COMMAND_ENVIRONMENT,
    timeout: float = 170,
) -> subprocess.CompletedProcess[str]:
    """``python <arguments>`` in a process of its own, as a person types it."""
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout, check=False
    )


class Keep(L.Callback):
    """Keeps what training steps return."""

    def __init__(self) -> None:
        self.iterations: list[Iteration] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: object
    ) -> None:
        self.iterations.append(outputs["iteration"])


@contextlib.contextmanager
def built(cfg: DictConfig) -> Iterator[tuple[L.Trainer, AgentModule, L.LightningDataModule]]:
    """Trainer, module and DataModule of ``cfg``; the environment workers end with the context."""
    L.seed_everything(cfg.seed, verbose=False)
    datamodule = build_datamodule(cfg)
    try:
        policy, _ = build_policy(cfg, datamodule)
        yield build_trainer(cfg), build_agent(cfg, policy, datamodule), datamodule
    finally:
        datamodule.close()


def fit(
    cfg: DictConfig,
    *,
    prepare: Callable[[AgentModule], None] | None = None,
    callbacks: Sequence[L.Callback] = (),
    ckpt_path: str | Path | None = None,
) -> AgentModule:
    """The module after a whole run of ``cfg``; ``prepare`` may change it before."""
    with built(cfg) as (trainer, module, datamodule):
        trainer.callbacks += callbacks
        if prepare is not None:
            prepare(module)
        trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)
        return module


def weights(module: AgentModule) -> dict[str, Tensor]:
    """A copy of everything that is trained."""
    return {name: p.detach().clone() for name, p in module.policy.trainable().items()}


def equal_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def warm_started_model(folder: Path) -> str:
    """A model folder made by the project's own warm start."""
    cfg = toy_config(folder, None)
    datamodule = build_datamodule(cfg)
    try:
        return str(warm_start(cfg, datamodule).folder)
    finally:
        datamodule.close()


def curves(folder: Path) -> dict[str, dict[int, float]]:
    """The scalars of a run's TensorBoard files: by name, then by step."""
    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return {
        name: {event.step: event.value for event in accumulator.Scalars(name)}
        for name in accumulator.Tags()["scalars"]
    }
