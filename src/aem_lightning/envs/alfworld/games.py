"""The games of a data folder, official or generated: listed in a fixed order, and hashed."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aem_lightning.envs.alfworld.engine import GOAL
from aem_lightning.envs.alfworld.problem import TASK_TYPES
from aem_lightning.envs.data import alfworld_folder
from aem_lightning.types import Task

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid_seen", "valid_unseen")
GOAL_MARK = "Your task is to: "


@dataclass(frozen=True, slots=True)
class Game:
    """A game of a data folder.

    Attributes:
        id: Its folder relative to ``json_2.1.1``: split, task folder, trial.
        path: Its ``game.tw-pddl``.
        split: One of `SPLITS`.
        task_type: One of the six task types.
        pddl_params: What the goal is about: ``object_target``, ``parent_target``,
            ``toggle_target``, ...
        goal: The goal in words.
        digest: SHA-256 of the game file, in hex.
        walkthrough: Actions that are said to win; official ones may hold names that the engine does
            not know, so check that each is admissible.
    """

    id: str
    path: Path
    split: str
    task_type: str
    pddl_params: dict[str, Any] = field(hash=False)
    goal: str
    digest: str
    walkthrough: tuple[str, ...] = ()

    @property
    def task(self) -> Task:
        """The game as the rest of the house knows it."""
        return Task(self.id, self.task_type, self.split)

    @property
    def params(self) -> dict[str, Any]:
        """What `SearchingExpert` needs to know of the game."""
        return {**self.pddl_params, "task_type": self.task_type}


def list_games(
    root: str | Path, split: str, *, task_types: Sequence[str] | None = None
) -> list[Game]:
    """The playable games of a split, sorted by id.

    Games with movable receptacles or sliced objects are left out, as upstream does, and so are
    games that are not marked as solvable.

    Args:
        root: The data folder, with ``json_2.1.1`` inside.
        split: One of `SPLITS`.
        task_types: Which of the six task types; None for all.

    Raises:
        ValueError: An unknown split or task type, or a split without playable games.
        FileNotFoundError: The folder is missing.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}; allowed: {', '.join(SPLITS)}")
    wanted = TASK_TYPES if task_types is None else tuple(task_types)
    if not wanted or set(wanted) - set(TASK_TYPES):
        raise ValueError(f"task_types={list(wanted)}; allowed: {', '.join(TASK_TYPES)}")
    folder = alfworld_folder(root, split)
    games, skipped = [], 0
    for path in sorted(folder.glob("*/*/game.tw-pddl")):
        game = _read(path, split)
        if game is None:
            skipped += 1
        elif game.task_type in wanted:
            games.append(game)
    if not games:
        raise ValueError(
            f"{folder} has no playable game of the task types {', '.join(wanted)} ({skipped} were "
            "skipped: movable receptacle, sliced object or unsolvable). Choose other task types, "
            "or add the override datamodule=alfworld_generated"
        )
    if skipped:
        logger.info("%s: %d of %d games skipped", folder, skipped, skipped + len(games))
    return games


def games_hash(games: Iterable[Game]) -> str:
    """Twelve hex digits that stand for a set of games, byte for byte and in any order."""
    lines = sorted(f"{game.id} {game.digest}" for game in games)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def _read(path: Path, split: str) -> Game | None:
    """The game at ``path``, or None where it cannot be played."""
    folder = path.parent
    name = f"{folder.parent.name}/{folder.name}"
    trajectory = folder / "traj_data.json"
    if "movable" in name or "Sliced" in name or not trajectory.is_file():
        return None
    content = path.read_bytes()
    game = json.loads(content)
    if not game.get("solvable"):
        return None
    about = json.loads(trajectory.read_bytes())
    # The sentence stands in the grammar, inside a JSON string.
    sentence = next((line for line in game["grammar"].splitlines() if GOAL_MARK in line), "")
    found = GOAL.search(sentence.strip().rstrip('"'))
    return Game(
        id=f"{split}/{name}",
        path=path,
        split=split,
        task_type=about["task_type"],
        pddl_params=about["pddl_params"],
        goal=found.group(1) if found else "",
        digest=hashlib.sha256(content).hexdigest(),
        walkthrough=tuple(game.get("walkthrough") or ()),
    )
