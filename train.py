"""Train an LLM agent: ``python train.py experiment=quickstart``; options: configs/train.yaml."""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from aem_lightning.runner import train
from aem_lightning.runner.cli import accept_plus, check_overrides, clear_errors, quiet_libraries

CONFIGS = Path(__file__).resolve().parent / "configs"


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
def main(cfg: DictConfig) -> None:
    """Run one training run."""
    quiet_libraries()
    with clear_errors():
        train(cfg)


if __name__ == "__main__":
    sys.argv[1:] = accept_plus(sys.argv[1:])
    check_overrides(CONFIGS, "train", sys.argv[1:])
    main()
