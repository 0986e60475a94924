"""Play all evaluation games once: ``python eval.py ckpt_path=last``; options: configs/eval.yaml.

A model behind an endpoint plays them too: ``python eval.py policy=api base_url=... model=...``.
"""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from aem_lightning.runner.cli import clear_errors, quiet_libraries
from aem_lightning.runner.command import Command
from aem_lightning.runner.early import check_evaluation
from aem_lightning.runner.signals import stoppable

CONFIGS = Path(__file__).resolve().parent / "configs"
COMMAND = Command(CONFIGS, "eval", "python eval.py", __doc__, check_evaluation)


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="eval")
def main(cfg: DictConfig) -> None:
    """Run one evaluation."""
    with clear_errors():
        COMMAND.check_job(cfg)
        from aem_lightning.runner import evaluate  # imports torch: after the checks

        quiet_libraries()
        evaluate(cfg)


if __name__ == "__main__":
    with stoppable():
        COMMAND.answer(sys.argv[1:])
        main()
