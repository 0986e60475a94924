"""Config in, trained or evaluated run out: the only room that knows Hydra's objects.

Light: torch and what needs it are imported when `train` or `evaluate` is first asked for, so that a
mistake on the command line is answered before.
"""

from typing import TYPE_CHECKING

from aem_lightning.lazy import lazily
from aem_lightning.runner import search_path

if TYPE_CHECKING:
    from aem_lightning.runner.evaluation import evaluate
    from aem_lightning.runner.training import train

search_path.register()

__all__ = ["evaluate", "train"]

__getattr__ = lazily(__name__, {"evaluation": ["evaluate"], "training": ["train"]})
