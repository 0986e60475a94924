"""Games for the real ALFWorld engine, made on the spot in the official folder layout.

A folder is a function of its parameters, byte for byte. It appears all at once, together with its
manifest, so that a reader never sees half of it and several processes may ask for it at the same
time. Every game is played on the engine before it counts: a wrong type or predicate in a problem
loads silently.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from aem_lightning.envs.alfworld.engine import AlfworldEnv
from aem_lightning.envs.alfworld.games import SPLITS
from aem_lightning.envs.alfworld.package import Kit, load_kit
from aem_lightning.envs.alfworld.problem import (
    TASK_TYPES,
    GamePlan,
    game_files,
    plan_game,
    walkthrough,
)
from aem_lightning.envs.alfworld.scenes import (
    DIFFICULTIES,
    SCENES_PER_ROOM,
    build_scene,
    keyed_random,
)
from aem_lightning.envs.pool import EnvPool
from aem_lightning.types import EnvStep, ResetRequest

logger = logging.getLogger(__name__)

VERSION = 1
MANIFEST = "manifest.json"
ATTEMPTS = 200
GAMES_AT_ONCE = 16  # per worker, while verifying
STALE_S = 3600.0


@dataclass(frozen=True)
class _Recipe:
    """The parameters of a folder, checked."""

    sizes: Mapping[str, int]
    difficulty: str
    seed: int
    task_types: tuple[str, ...]
    train_scenes: int

    def __post_init__(self) -> None:
        unknown = sorted(set(self.sizes) - set(SPLITS))
        if unknown or not self.sizes or min(self.sizes.values()) < 0:
            raise ValueError(
                f"sizes={dict(self.sizes)}; give a number of games for one or more of "
                f"{', '.join(SPLITS)}"
            )
        if self.difficulty not in DIFFICULTIES:
            raise ValueError(
                f"difficulty={self.difficulty!r}; allowed: {', '.join(sorted(DIFFICULTIES))}"
            )
        if not self.task_types or set(self.task_types) - set(TASK_TYPES):
            raise ValueError(
                f"task_types={list(self.task_types)}; allowed: {', '.join(TASK_TYPES)}"
            )
        if not 1 <= self.train_scenes < SCENES_PER_ROOM:
            raise ValueError(
                f"train_scenes={self.train_scenes}; allowed: 1 to {SCENES_PER_ROOM - 1}, since "
                "valid_unseen needs the rest"
            )

    def scenes(self, split: str) -> range:
        """The scenes of a split: train and valid_seen share theirs, valid_unseen has the others."""
        if split == "valid_unseen":
            return range(self.train_scenes, SCENES_PER_ROOM)
        return range(self.train_scenes)

    def describe(self) -> dict[str, Any]:
        sizes = {split: self.sizes[split] for split in SPLITS if split in self.sizes}
        lists = {"sizes": sizes, "task_types": list(self.task_types)}
        return {"version": VERSION, **asdict(self), **lists}


def generate_games(
    root: str | Path,
    *,
    sizes: Mapping[str, int],
    difficulty: str,
    seed: int,
    task_types: Sequence[str] | None = None,
    train_scenes: int = 24,
    workers: int = 1,
) -> list[Path]:
    """The game files under ``root``, made where they are not there yet.

    No two games of a folder have the same start state, over all splits. The games of the validation
    splits do not depend on the size of the train split.

    Args:
        root: The data folder; ``json_2.1.1/<split>/...`` is made in it.
        sizes: Games for each of ``train``, ``valid_seen`` and ``valid_unseen``.
        difficulty: ``easy``, ``medium`` or ``hard``.
        seed: Seed of everything drawn.
        task_types: Which of the six task types, in turn; None for all.
        train_scenes: Scenes of every room type, of 30, for train and valid_seen; the others are
            unseen.
        workers: Processes that verify the games.

    Returns:
        The ``game.tw-pddl`` files, split by split.

    Raises:
        ValueError: A parameter is out of range, the folder holds other games, or the scenes hold
            too few different games.
        MissingExtraError: alfworld or textworld is not installed.
    """
    recipe = _Recipe(dict(sizes), difficulty, seed, tuple(task_types or TASK_TYPES), train_scenes)
    root = Path(root)
    games = root / "json_2.1.1"
    found = _finished(games, recipe)
    if found is not None:
        return found
    load_kit()
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob(".partial-*"):  # what a killed process has left behind
        if time.time() - left.stat().st_mtime > STALE_S:
            shutil.rmtree(left, ignore_errors=True)
    logger.info("Making %d games in %s: each is played to its end", sum(sizes.values()), games)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=root) as folder:
        _fill(Path(folder), recipe, workers)
        _publish(Path(folder), root)
    logger.info("Games made in %s, in %.1f s", games, time.monotonic() - started)
    found = _finished(games, recipe)
    if found is None:
        raise OSError(f"{games} was changed by someone else while games were made there; try again")
    return found


def _finished(games: Path, recipe: _Recipe) -> list[Path] | None:
    """The games of a finished folder; None where it is missing or lacks files.

    Raises:
        ValueError: The folder holds other games.
    """
    if not games.exists():
        return None
    try:
        manifest = json.loads((games / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        manifest = {}
    if not {"parameters", "games"} <= set(manifest):
        raise ValueError(
            f"{games} holds games that this generator did not make; choose another data folder"
        )
    if manifest["parameters"] != recipe.describe():
        raise ValueError(
            f"{games} holds games with other parameters: {manifest['parameters']}, asked for: "
            f"{recipe.describe()}. Choose another data folder, or delete {games}"
        )
    paths = [games / name / "game.tw-pddl" for name in manifest["games"]]
    is_whole = all(path.is_file() and (path.parent / "traj_data.json").is_file() for path in paths)
    return paths if is_whole else None


def _publish(partial_root: Path, root: Path) -> None:
    """Move the finished games into place; where another process was first, its equal games stay."""
    if (root / "json_2.1.1").exists():  # found incomplete
        aside = partial_root / "replaced"
        (root / "json_2.1.1").rename(aside)
    for name in ("logic", "json_2.1.1"):
        try:
            (partial_root / name).rename(root / name)
        except OSError:
            if not (root / name).is_dir():
                raise


def _fill(root: Path, recipe: _Recipe, workers: int) -> None:
    """Write and verify all games and the manifest under ``root``."""
    kit = load_kit()
    (root / "logic").mkdir()
    (root / "logic" / "alfred.pddl").write_text(kit.domain, encoding="utf-8")
    (root / "logic" / "alfred.twl2").write_text(kit.grammar, encoding="utf-8")
    (root / "json_2.1.1").mkdir()
    for split in recipe.sizes:
        (root / "json_2.1.1" / split).mkdir()
    planner = _Planner(kit, recipe)
    # Train comes last, so that its size leaves the validation games alone.
    slots = ((split, i) for split in reversed(SPLITS) for i in range(recipe.sizes.get(split, 0)))
    plans = {slot: planner.next_plan(*slot) for slot in slots}
    rejected = 0
    waiting = dict(plans)
    with EnvPool(partial(AlfworldEnv, str(root)), workers=workers) as pool:
        while waiting:
            for (split, _), plan in waiting.items():
                _write(root, kit, split, plan)
            failed = _failures(pool, kit, waiting, GAMES_AT_ONCE * workers)
            for slot, reason in failed.items():
                logger.warning("Game %s is made again: %s", _name(slot[0], plans[slot]), reason)
                shutil.rmtree(root / "json_2.1.1" / _name(slot[0], plans[slot]))
                plans[slot] = planner.next_plan(*slot)
            rejected += len(failed)
            waiting = {slot: plans[slot] for slot in failed}
    ordered = sorted(plans, key=lambda slot: (SPLITS.index(slot[0]), slot[1]))
    names = [_name(slot[0], plans[slot]) for slot in ordered]
    manifest = {"parameters": recipe.describe(), "rejected": rejected, "games": names}
    path = root / "json_2.1.1" / MANIFEST
    path.write_text(json.dumps(manifest, indent=1), encoding="utf-8")


class _Planner:
    """Plans games, never one start state twice; a second call for a slot gives another game."""

    def __init__(self, kit: Kit, recipe: _Recipe) -> None:
        self._kit = kit
        self._recipe = recipe
        self._seen: set[tuple[object, ...]] = set()
        self._attempts: dict[tuple[str, int], int] = {}

    def next_plan(self, split: str, index: int) -> GamePlan:
        recipe = self._recipe
        task_type = recipe.task_types[index % len(recipe.task_types)]
        difficulty = DIFFICULTIES[recipe.difficulty]
        first = self._attempts.get((split, index), 0)
        for attempt in range(first, first + ATTEMPTS):
            seed = (recipe.seed, split, index, attempt)
            rng = keyed_random("scene of", seed)
            room = rng.choice(self._kit.rooms[task_type])
            scene = build_scene(room, rng.choice(recipe.scenes(split)), difficulty.receptacles)
            plan = plan_game(self._kit, task_type, scene, difficulty, seed)
            if plan is not None and plan.start_state not in self._seen:
                self._seen.add(plan.start_state)
                self._attempts[split, index] = attempt + 1
                return plan
        raise ValueError(
            f"No further {task_type} game of difficulty {recipe.difficulty} was found for {split} "
            f"in {ATTEMPTS} attempts; ask for fewer games (sizes={dict(recipe.sizes)}), more "
            "scenes or a higher difficulty"
        )


def _name(split: str, plan: GamePlan) -> str:
    return f"{split}/{plan.folder}/{plan.trial}"


def _write(root: Path, kit: Kit, split: str, plan: GamePlan) -> None:
    folder = root / "json_2.1.1" / _name(split, plan)
    folder.mkdir(parents=True)
    for name, text in game_files(kit, plan).items():
        (folder / name).write_text(text, encoding="utf-8")


def _failures(
    pool: EnvPool, kit: Kit, plans: Mapping[tuple[str, int], GamePlan], at_once: int
) -> dict[tuple[str, int], str]:
    """Play every walkthrough on the engine; what is wrong with the games that do not pass."""
    slots = list(plans)
    failed: dict[tuple[str, int], str] = {}
    for start in range(0, len(slots), at_once):
        chunk = {os.path.join(*map(str, slot)): slot for slot in slots[start : start + at_once]}
        todo = {key: walkthrough(kit, plans[slot]) for key, slot in chunk.items()}
        steps = pool.reset(
            {
                key: ResetRequest(_name(slot[0], plans[slot]), 0, affinity)
                for affinity, (key, slot) in enumerate(chunk.items())
            }
        )
        while todo:
            actions = {}
            for key in list(todo):
                reason = _problem_with(steps[key], todo[key])
                if reason is not None:
                    failed[chunk[key]] = reason
                if reason is not None or not todo[key]:
                    del todo[key]
                else:
                    actions[key] = todo[key].pop(0)
            steps = pool.step(actions)
        pool.release(chunk)
    return failed


def _problem_with(step: EnvStep, left: Sequence[str]) -> str | None:
    """What is wrong with an episode that has the actions ``left`` to go; None where nothing is."""
    if step.infra_error:
        return step.infra_error
    if not left:
        return None if step.won and step.terminated else "its walkthrough does not win"
    if step.won or step.terminated:
        return f"it is won {len(left)} actions before its walkthrough ends"
    if left[0] not in step.admissible_actions:
        return f"its walkthrough's action {left[0]!r} is not admissible"
    return None
