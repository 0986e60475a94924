"""Generated games that several tests share, made once per test run."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from aem_lightning.envs.alfworld import generate_games

SIZES = {"train": 12, "valid_seen": 6, "valid_unseen": 6}


@cache
def shared_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="aem-games-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def games_root(difficulty: str, train: int = 12) -> Path:
    """A data folder with 6 validation games each and ``train`` training games."""
    root = shared_folder() / f"{difficulty}-{train}"
    sizes = SIZES | {"train": train}
    generate_games(root, sizes=sizes, difficulty=difficulty, seed=0, workers=2)
    return root
