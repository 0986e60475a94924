"""Play all evaluation games, with a checkpoint: ``python eval.py ckpt_path=last``.

With a model, as it is or with an adapter, on any experiment (options: configs/train.yaml):
``python eval.py experiment=alfworld policy.model=FOLDER``, ``python eval.py adapter=FOLDER ...``.
With one behind an endpoint: ``python eval.py policy=api base_url=... model=...``.
"""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from aem_lightning.runner.cli import clear_errors, quiet_libraries
from aem_lightning.runner.command import Command
from aem_lightning.runner.early import check_evaluation
from aem_lightning.runner.played import as_training, contradiction, plays_model
from aem_lightning.runner.ranks import meet
from aem_lightning.runner.signals import stoppable

CONFIGS = Path(__file__).resolve().parent / "configs"


def main() -> None:
    """Run one evaluation."""
    name = "eval"
    if told := contradiction(sys.argv[1:]):
        sys.exit(told)
    if plays_model(sys.argv[1:]):
        name, sys.argv[1:] = "train", as_training(sys.argv[1:])
    command = Command(CONFIGS, name, "python eval.py", __doc__, check_evaluation)
    command.answer(sys.argv[1:])
    meet()

    def run(cfg: DictConfig) -> None:
        with clear_errors():
            command.check_job(cfg)
            from aem_lightning.runner import evaluate  # imports torch: after the checks

            quiet_libraries()
            evaluate(cfg)

    hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=name)(run)()


if __name__ == "__main__":
    with stoppable():
        main()
