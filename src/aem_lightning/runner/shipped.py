"""What belongs to this project beside its modules, and what its commands are called.

A checkout has ``configs``, ``train.py`` and ``eval.py`` at its top, and ``python train.py`` trains.
A wheel has ``configs`` inside the package, and ``aem-train`` trains.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
CHECKOUT = PACKAGE.parents[1]
SCRIPT = re.compile(r"(?<![\w/.\\-])(?:python )?(train|eval)\.py\b")
MODULE = re.compile(r"(?<![\w/.\\-])python -m aem_lightning\.(analysis|viewer)\b")


def shipped(name: str) -> Path:
    """The file or folder ``name`` inside an installed package, or else at the top of a checkout."""
    inside = PACKAGE / name
    return inside if inside.exists() else CHECKOUT / name


def from_install() -> bool:
    """Whether a person types ``aem-train`` here, and not ``python train.py``."""
    running = Path(sys.argv[0]).name if sys.argv else ""
    if running in ("train.py", "eval.py"):
        return False
    return running.startswith("aem-") or not (CHECKOUT / "train.py").is_file()


def as_typed(text: str) -> str:
    """``text`` with the names that the commands of a checkout have here.

    >>> as_typed("Type python train.py --cfg job") in (
    ...     "Type python train.py --cfg job",
    ...     "Type aem-train --cfg job",
    ... )
    True
    """
    if not from_install():
        return text
    text = SCRIPT.sub(r"aem-\1", text)
    return MODULE.sub(lambda found: f"aem-{found[1].removesuffix('er')}", text)
