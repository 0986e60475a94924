"""Policies of a real shape with random weights, and the runs that are composed around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from transformers import Qwen2Config, Qwen2ForCausalLM

from aem_lightning.gpu_check.piece import Check
from aem_lightning.modules import Policy, build_tokenizer
from aem_lightning.runner.build import build_datamodule
from aem_lightning.runner.cli import accept_plus
from aem_lightning.runner.known_models import SHAPES as KNOWN

# `tiny` stands for the others on a CPU.
SHAPES: dict[str, Mapping[str, Any]] = {
    "1.5b": KNOWN["qwen2.5-1.5b"][1],
    "7b": KNOWN["qwen2.5-7b"][1],
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
        "tie_word_embeddings": True,
    },
}


def random_model(shape: str, device: str) -> Qwen2ForCausalLM:
    """A causal LM of ``shape`` on ``device`` in bfloat16, with the same weights every time."""
    config = Qwen2Config(**SHAPES[shape], max_position_embeddings=32768, dtype=torch.bfloat16)
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = Qwen2ForCausalLM(config)
    half: Qwen2ForCausalLM = model.to(torch.bfloat16).eval()
    return half


def model_folder(check: Check, shape: str) -> Path:
    """A folder with such a model, and a tokenizer that has the words of the generated games."""
    shape = "tiny" if check.small else shape
    folder = check.folder / "models" / shape
    if not (folder / "config.json").is_file():
        datamodule = build_datamodule(composed(check, "words"))
        tokenizer = build_tokenizer(datamodule.vocabulary())
        Policy(random_model(shape, check.device), tokenizer).save_model(folder)
    return folder


def composed(check: Check, name: str, *overrides: str, experiment: str = "alfworld") -> DictConfig:
    """The config of ``experiment`` on a few generated games, for a run into the folder ``name``."""
    words = [f"experiment={experiment}", *games(check), *overrides]
    words.append(f"paths.output_dir={check.folder / 'runs' / name}")
    with initialize_config_dir(str(check.root / "configs"), version_base="1.3"):
        cfg = compose("train", overrides=accept_plus(words))
    Path(cfg.paths.output_dir).mkdir(parents=True, exist_ok=True)
    OmegaConf.resolve(cfg)
    return cfg


def games(check: Check) -> Sequence[str]:
    """Overrides for a few games, made once and below the check's folder; nothing beside the run."""
    few = "{train: 4, valid_seen: 1, valid_unseen: 1}"
    some = "{train: 16, valid_seen: 4, valid_unseen: 4}"
    return [
        "datamodule=alfworld_generated",
        f"datamodule.generate.sizes={few if check.small else some}",
        f"paths.root_dir={check.folder}",
        f"trainer.accelerator={check.device}",
        "evaluate=false",
        "preflight=false",
        "rollout_journal=false",
        "callbacks=null",
        "logger=null",
        "datamodule.validation_tasks=0",
    ]
