"""What cannot work on several ranks, told before anything is imported or loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator

from omegaconf import DictConfig, OmegaConf

SHARDED = "fsdp2"  # trainer.strategy of trainer=fsdp


def is_sharded(cfg: DictConfig) -> bool:
    """Whether the policy's frozen weights are shared by ranks."""
    return bool(OmegaConf.select(cfg, "trainer.strategy") == SHARDED)


def problems_of_ranks(cfg: DictConfig) -> Iterator[str]:
    """What is wrong with ``cfg``, of ``configs/train.yaml``, where several ranks are to run it."""
    nodes = OmegaConf.select(cfg, "trainer.num_nodes", default=1)
    if nodes != 1 and not {"RANK", "SLURM_PROCID"} & {*os.environ}:
        yield (
            f"trainer.num_nodes={nodes}: ranks of several machines are started by torchrun or srun "
            "(docs/scale.md has both commands). Type one of them, or trainer.num_nodes=1"
        )
    if is_sharded(cfg):
        yield from _problems_of_sharding(cfg)


def _problems_of_sharding(cfg: DictConfig) -> Iterator[str]:
    about = "trainer=fsdp leaves each rank a part of every layer"
    devices = OmegaConf.select(cfg, "trainer.devices")
    if str(devices) == "1" and OmegaConf.select(cfg, "trainer.num_nodes", default=1) == 1:
        yield f"trainer.devices={devices}: {about}, and one rank has no other: type trainer=gpu"
    if str(cfg.engine.get("_target_")).endswith(".SlotEngine"):
        yield (
            f"engine.cache={cfg.engine.get('cache')}: {about}, and an engine of the same process "
            "would collect them anew for every token: type engine=vllm engine.urls=[http://a:8000,"
            "http://b:8000]"
        )
    if cfg.policy.get("quantization") is not None:
        yield (
            f"policy.quantization={cfg.policy.quantization}: {about}, and 4-bit weights are packed "
            "whole: type policy.quantization=null, or trainer=ddp"
        )
    if str(cfg.advantage.get("_target_")).endswith(".PPO"):
        yield (
            f"advantage=ppo: {about}, and a value head is fitted to a model that is whole: type "
            "algorithm=grpo, or trainer=ddp"
        )
    if cfg.get("stage") == "warm_start":
        yield f"stage=warm_start runs on one device, and {about}: type trainer=gpu"
    if cfg.get("preflight") in (True, "only"):
        yield (
            f"preflight={cfg.preflight}: rank 0 does it alone, and {about}: type preflight=auto, "
            "which leaves it out"
        )
