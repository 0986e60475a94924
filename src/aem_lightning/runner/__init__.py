"""Config in, trained or evaluated run out: the only room that knows Hydra's objects.

Light: torch and what needs it are imported when `train` or `evaluate` is first asked for, so that a
mistake on the command line is answered before.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from aem_lightning.runner import search_path

if TYPE_CHECKING:
    from aem_lightning.runner.evaluation import evaluate
    from aem_lightning.runner.training import train

# peft imports bitsandbytes, which then reports a kernel package that it would like on a CPU.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
search_path.register()

__all__ = ["evaluate", "train"]

_HOMES = {"evaluate": "evaluation", "train": "training"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
