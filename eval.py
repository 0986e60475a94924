"""Play all evaluation games, with a checkpoint: ``python eval.py ckpt_path=last``."""

from aem_lightning.runner.commands import evaluate

if __name__ == "__main__":
    evaluate()
