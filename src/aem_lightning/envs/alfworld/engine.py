"""ALFWorld's text engine as a `TextEnv`."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from aem_lightning.envs.alfworld.cache import apply_engine_caches
from aem_lightning.envs.alfworld.goals import GOAL, GOALS, Goals, human_goal
from aem_lightning.envs.alfworld.package import import_optional
from aem_lightning.envs.base import Reset, Step, TextEnv
from aem_lightning.envs.transition_cache import TransitionCache, shared_store

logger = logging.getLogger(__name__)

BANNER = "-= Welcome to TextWorld, ALFRED! =-\n\n"


class AlfworldEnv:
    """An ALFWorld game, played in text: official and generated games alike.

    ``reset(options={"task_id": id})`` starts a game of the folder; the seed changes nothing, since
    a game file is one start state. The reward is 1.0 for the step that wins, else 0.0. ``info`` has
    all reserved keys except ``infra_error``.

    Args:
        root: The data folder, with ``json_2.1.1/<split>/...`` inside.
        cached: Speed the engine up and remember transitions (`cache`, `transition_cache`); what is
            shown stays the same. This patches the engine in this process: meant for worker
            processes.
        goals: In whose words the goal is said: ``template``, the game file's, or ``human``, one of
            the annotations of the game, where official files made for it have theirs.

    Raises:
        ValueError: Other ``goals``, or a game that nobody annotated.
        MissingExtraError: alfworld or textworld is not installed.
        FileNotFoundError: There is no such data folder.
    """

    def __init__(self, root: str | Path, *, cached: bool = True, goals: Goals = "template") -> None:
        if goals not in GOALS:
            raise ValueError(f"goals={goals!r}; allowed: {', '.join(GOALS)}")
        self._games, self._goal = Path(root) / "json_2.1.1", ""
        self._is_human = goals == "human"
        game: TextEnv = _GameEngine(Path(root), cached=cached)
        if cached:
            game = TransitionCache(game, shared_store("alfworld", str(Path(root).absolute())))
        self._game = game

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> Reset:
        """Start the game ``options["task_id"]``.

        Raises:
            ValueError: No task id was given.
            FileNotFoundError: The data folder has no such game.
        """
        if not options or "task_id" not in options:
            raise ValueError(
                f"reset(options={options!r}): give options={{'task_id': id}}, the id of a game "
                "as in list_games(root, split)"
            )
        observation, info = self._game.reset(seed=seed, options={"task_id": options["task_id"]})
        if self._is_human:
            self._goal = _annotation(self._games, options["task_id"])
            said = f"Your task is to: {self._goal}."
            observation = GOAL.sub(lambda _: said, observation)
        return observation, self._worded(info)

    def step(self, action: str) -> Step:
        """Play ``action``; one that is not admissible is answered "Nothing happens."."""
        observation, reward, terminated, truncated, info = self._game.step(action)
        return observation, reward, terminated, truncated, self._worded(info)

    def _worded(self, info: dict[str, Any]) -> dict[str, Any]:
        """``info`` with the goal in the words that are asked for."""
        return info | {"goal": self._goal} if self._is_human else info

    def counters(self) -> dict[str, int]:
        """Hits and misses of the transitions that this process remembers, since last asked."""
        return self._game.counters() if isinstance(self._game, TransitionCache) else {}

    def close(self) -> None:
        """Free the game."""
        self._game.close()


class _GameEngine:
    """One textworld environment, loaded with one game after the other.

    It is made once: every further one would load another copy of the planner's library.
    """

    def __init__(self, root: Path, *, cached: bool) -> None:
        self._games = root / "json_2.1.1"
        if not self._games.is_dir():
            raise FileNotFoundError(f"No ALFWorld games in {root}: {self._games} is not a folder")
        self._env = _stack_engine(cached=cached)
        self._task_id: str | None = None
        self._constant: dict[str, Any] = {}
        self._admissible: tuple[str, ...] = ()

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> Reset:
        task_id = str((options or {})["task_id"])
        if task_id != self._task_id:
            path = self._games / task_id / "game.tw-pddl"
            if not path.is_file():
                raise FileNotFoundError(f"No game {task_id!r}: {path} is missing")
            self._task_id = None  # until the load has succeeded
            self._env.load(str(path))
            self._task_id = task_id
        state = self._env.reset()
        observation = state.feedback.removeprefix(BANNER)
        found = GOAL.search(observation)
        self._constant = {"task_id": task_id, "goal": found.group(1) if found else ""}
        return observation, self._info(state, is_valid=True)

    def step(self, action: str) -> Step:
        is_valid = action.strip() in self._admissible
        state, _, _ = self._env.step(action)
        info = self._info(state, is_valid=is_valid)
        return state.feedback, float(info["won"]), info["won"], False, info

    def _info(self, state: Any, *, is_valid: bool) -> dict[str, Any]:
        self._admissible = tuple(sys.intern(command) for command in state["admissible_commands"])
        won = bool(state["won"])
        return self._constant | {
            "admissible_actions": self._admissible,
            "is_action_valid": is_valid,
            "won": won,
            "score": float(won),
        }

    def close(self) -> None:
        self._env.close()


def _stack_engine(*, cached: bool) -> Any:
    """The engine in the wrappers that ``AlfredTWEnv`` puts around it, without its batch layer."""
    textworld = import_optional("textworld")
    pddl = import_optional("textworld.envs")
    wrappers = import_optional("alfworld.agents.environment.alfred_tw_env")
    if cached:
        apply_engine_caches()
    wanted = textworld.EnvInfos(won=True, admissible_commands=True, extras=["gamefile"])
    return wrappers.AlfredInfos(wrappers.AlfredDemangler(pddl.PddlEnv(wanted), shuffle=False))


@lru_cache(4096)
def _annotation(games: Path, task_id: str) -> str:
    """The human goal of a game."""
    about = (games / task_id / "traj_data.json").read_text(encoding="utf-8")
    return human_goal(json.loads(about), task_id)
