"""What a run makes and checks first: trainer, engine, and the policy where it needs no games."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import lightning as L
from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import DictConfig
from torch import Tensor

from aem_lightning.modules import Policy
from aem_lightning.modules.self_check import CHECKED, self_check
from aem_lightning.modules.settings import Packing
from aem_lightning.rollout import RolloutEngine, VllmEngine
from aem_lightning.rollout.shortage import in_stage
from aem_lightning.runner.build import build_trainer, instantiate, known_policy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What is there before games are.

    Attributes:
        trainer: The trainer.
        engine: The engine.
        policy: See `known_policy`.
    """

    trainer: L.Trainer
    engine: RolloutEngine
    policy: Policy | None

    @classmethod
    def of(
        cls,
        cfg: DictConfig,
        iteration: int = 0,
        *,
        policy: Policy | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Start:
        """The start of ``cfg``; its policy is checked.

        Args:
            cfg: The config.
            iteration: The one that a run goes on at.
            policy: One that is there already.
            weights: The state of an agent, of which the policy takes what fits it.

        Raises:
            ValueError: The model is scored or sampled wrongly.
        """
        trainer, engine = build_trainer(cfg, start=iteration), instantiate(cfg.engine)
        policy = policy or known_policy(cfg)
        if policy is not None:
            _take(policy, weights or {})
            # A warm start samples nothing.
            check_policy(trainer, policy, engine if cfg.stage == "train" else None, cfg.packing)
        return cls(trainer, engine, policy)


def _take(policy: Policy, weights: Mapping[str, Tensor]) -> None:
    """Load adapters; whoever restores the whole agent says what does not fit."""
    found = {name: weights.get(f"policy.{name}") for name in policy.trainable()}
    fitting = {
        name: value
        for name, value in found.items()
        if value is not None and value.shape == policy.trainable()[name].shape
    }
    if len(fitting) == len(found):
        policy.load_state_dict(fitting, strict=False)


def check_policy(
    trainer: L.Trainer, policy: Policy, engine: RolloutEngine | None, packing: Packing
) -> None:
    """The self-check of a policy, once, on the device and in the precision that it will run in.

    The sampler of a vLLM server is checked by every iteration's ``policy/sampler_gap``.

    Raises:
        ValueError: The model is scored or sampled wrongly.
    """
    is_hollow = policy.sharded and policy.shard_group is None
    if policy in CHECKED or is_hollow:  # whose strategy asks again
        return
    with in_stage("loading the policy", "policy.quantization=nf4, or a smaller policy=..."):
        policy.to(trainer.strategy.root_device)
    asked = None if isinstance(engine, VllmEngine) else engine
    with (
        in_stage("the self-check", "a smaller policy=..."),
        isolate_rng(),
        trainer.precision_plugin.forward_context(),
    ):
        gaps = self_check(policy, asked, packing)
    log.info("self-check: %s", gaps or "the model's own logits are not finite")
