"""The games of a data folder, official or generated: listed in a fixed order, and hashed."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from aem_lightning.envs.alfworld.goals import GOAL, GOALS, Goals, human_goal
from aem_lightning.envs.alfworld.problem import TASK_TYPES
from aem_lightning.envs.data import alfworld_folder
from aem_lightning.types import Task

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid_seen", "valid_unseen")
PUBLISHED = {"train": 3553, "valid_seen": 140, "valid_unseen": 134}  # playable games of each
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
        digest: SHA-256 of the game file, and of a human goal with it, in hex.
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


class Folder(NamedTuple):
    """What the folder of a split holds: playable games by id, and how many others, by reason."""

    games: list[Game]
    skipped: Counter[str]


def list_games(
    root: str | Path,
    split: str,
    *,
    task_types: Sequence[str] | None = None,
    goals: Goals = "template",
    found: Folder | None = None,
) -> list[Game]:
    """The playable games of a split, sorted by id.

    Games with movable receptacles or sliced objects are left out, as upstream does, and so are
    games that are not marked as solvable.

    Args:
        root: The data folder, with ``json_2.1.1`` inside.
        split: One of `SPLITS`.
        task_types: Which of the six task types; None for all.
        goals: ``template``, the game file's own words, or ``human``, one of its annotations.
        found: What `check_folder` found, where that was asked; it takes seconds to read.

    Raises:
        ValueError: An unknown split or task type, a split without playable games, or a game that
            nobody annotated.
        FileNotFoundError: The folder is missing.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}; allowed: {', '.join(SPLITS)}")
    wanted = TASK_TYPES if task_types is None else tuple(task_types)
    if not wanted or set(wanted) - set(TASK_TYPES):
        raise ValueError(f"task_types={list(wanted)}; allowed: {', '.join(TASK_TYPES)}")
    folder = alfworld_folder(root, split)
    found = found or _scan(folder, split, goals)
    kept = [game for game in found.games if game.task_type in wanted]
    skipped = found.skipped.total()
    if not kept:
        raise ValueError(
            f"{folder} has no playable game of the task types {', '.join(wanted)} ({skipped} were "
            "skipped: movable receptacle, sliced object or unsolvable). Choose other task types, "
            "or add the override datamodule=alfworld_generated"
        )
    if skipped:
        logger.info("%s: %d of %d games skipped", folder, skipped, skipped + len(found.games))
    return kept


def check_folder(root: str | Path, goals: Goals = "template") -> dict[str, Folder]:
    """What each split of a data folder holds; the log says so, and what the published set has not.

    Raises:
        ValueError: With human goals, a game that nobody annotated.
    """
    found = {split: _scan(Path(root) / "json_2.1.1" / split, split, goals) for split in SPLITS}
    for split, folder in found.items():
        reasons = ", ".join(f"{count} {why}" for why, count in sorted(folder.skipped.items()))
        logger.info(
            "%s: %d of %d games can be played, hash %s%s",
            *(split, len(folder.games), len(folder.games) + folder.skipped.total()),
            games_hash(folder.games),
            f"; left out: {reasons}" if reasons else "",
        )
    differing = [
        f"{split} has {len(folder.games)} of {PUBLISHED[split]}"
        for split, folder in found.items()
        if len(folder.games) != PUBLISHED[split]
    ]
    if differing:
        logger.warning(
            "%s does not hold the published games (%s), so compare results with those of the same "
            "hash alone. To fetch what is missing, type ALFWORLD_DATA=%s alfworld-download",
            *(root, ", ".join(differing), root),
        )
    return found


def games_hash(games: Iterable[Game]) -> str:
    """Twelve hex digits that stand for a set of games, byte for byte and in any order."""
    lines = sorted(f"{game.id} {game.digest}" for game in games)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def _scan(folder: Path, split: str, goals: Goals) -> Folder:
    if goals not in GOALS:
        raise ValueError(f"goals={goals!r}; allowed: {', '.join(GOALS)}")
    games: list[Game] = []
    skipped: Counter[str] = Counter()
    for path in sorted(folder.glob("*/*")):
        if path.is_dir():
            game = _read(path, split, goals)
            if isinstance(game, Game):
                games.append(game)
            elif game:
                skipped[game] += 1
    return Folder(games, skipped)


def _read(folder: Path, split: str, goals: Goals) -> Game | str:
    """The game in ``folder``, or why it cannot be played; empty where there is none."""
    name = f"{folder.parent.name}/{folder.name}"
    path, trajectory = folder / "game.tw-pddl", folder / "traj_data.json"
    if not path.is_file():
        return "without a game file" if trajectory.is_file() else ""
    if "movable" in name or "Sliced" in name:
        return "with movable receptacles or sliced objects"
    if not trajectory.is_file():
        return "without traj_data.json"
    content = path.read_bytes()
    try:
        game, about = json.loads(content), json.loads(trajectory.read_bytes())
    except ValueError:
        logger.warning("%s holds no whole JSON file: fetch it again", folder)
        return "broken"
    if not game.get("solvable"):
        return "unsolvable"
    # The sentence stands in the grammar, inside a JSON string.
    sentence = next((line for line in game["grammar"].splitlines() if GOAL_MARK in line), "")
    found = GOAL.search(sentence.strip().rstrip('"'))
    goal = found.group(1) if found else ""
    if goals == "human":
        goal = human_goal(about, f"{split}/{name}")
        content += goal.encode()
    return Game(
        id=f"{split}/{name}",
        path=path,
        split=split,
        task_type=about["task_type"],
        pddl_params=about["pddl_params"],
        goal=goal,
        digest=hashlib.sha256(content).hexdigest(),
        walkthrough=tuple(game.get("walkthrough") or ()),
    )
