"""Train an LLM agent: ``python train.py experiment=quickstart``; options: configs/train.yaml."""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from aem_lightning.runner.cli import accept_plus, clear_errors, quiet_libraries
from aem_lightning.runner.command import Command
from aem_lightning.runner.early import check_training
from aem_lightning.runner.ranks import meet
from aem_lightning.runner.signals import stoppable

CONFIGS = Path(__file__).resolve().parent / "configs"
COMMAND = Command(CONFIGS, "train", "python train.py", __doc__, check_training)


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Run one training run; what it comes to, where a search asks (``optimized_metric``)."""
    with clear_errors():
        COMMAND.check_job(cfg)
        from aem_lightning.runner import train  # imports torch: after the checks
        from aem_lightning.runner.summary import exit_status, optimized

        quiet_libraries()
        summary = train(cfg)
        if status := exit_status(cfg, summary):
            sys.exit(status)
        return optimized(cfg, summary)


if __name__ == "__main__":
    with stoppable():
        sys.argv[1:] = accept_plus(sys.argv[1:])
        COMMAND.answer(sys.argv[1:])
        meet()
        main()
