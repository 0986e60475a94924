"""Config in, trained or evaluated run out: the only room that knows Hydra's objects."""

from aem_lightning.runner.evaluate import evaluate
from aem_lightning.runner.train import train

__all__ = ["evaluate", "train"]
