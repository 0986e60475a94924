"""The toy environment without worker processes, for tests of one room."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from coin import CoinDataModule
from tiny_play import PLAIN, LocalPool, make_policy

from aem_lightning.algorithms import AEM, GRPO, ClippedLoss
from aem_lightning.modules import AgentModule, Policy, RolloutSettings, UpdateSettings
from aem_lightning.rollout import PromptEncoder, RewardShaping, SlotEngine


class LocalCoin(CoinDataModule):
    """`CoinDataModule` whose episodes are played in this process."""

    pool = property(lambda self: self.__dict__.setdefault("_local", LocalPool()))


def make_agent(policy: Policy | None = None, **changes: Any) -> AgentModule:
    """An agent that plays episodes of two turns in groups of four."""
    policy = policy or make_policy(awake=True)
    rollout = RolloutSettings(
        group_size=4,
        max_turns=2,
        max_new_tokens=4,
        max_context=96,
        eval_temperature=1.0,
        concurrency=8,
    )
    parts: dict[str, Any] = {
        "engine": SlotEngine(slots=8, max_length=96, bucket=32),
        "encoder": PromptEncoder(policy.tokenizer, PLAIN, "transcript"),
        "rewards": RewardShaping(),
        "estimator": GRPO(),
        "modulation": AEM(min_range=0.0),
        "loss": ClippedLoss(),
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        "rollout": rollout,
        "update": UpdateSettings(num_minibatches=2, micro_batch_tokens=128),
        "task_types": ("red", "blue", "green", "white"),
    }
    return AgentModule(policy, **{**parts, **changes})


def local_data(**changes: Any) -> LocalCoin:
    settings = {"tasks_per_iteration": 2, "iterations_per_epoch": 1, "validation_tasks": 2}
    return LocalCoin(**{**settings, **changes})


def make_trainer(epochs: int = 1, **changes: Any) -> L.Trainer:
    """A silent trainer on the CPU."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": epochs,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }
    return L.Trainer(**{**settings, **changes})
