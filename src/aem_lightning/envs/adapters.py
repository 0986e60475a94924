"""Environments of other libraries as `TextEnv`: Gymnasium, TextArena, reasoning-gym, OpenEnv.

Their start states are numbers: the task ``<split>/<number>`` is what the library makes of that
number, by its own seeding. A win is a last reward of at least ``win_at``, unless the environment
says itself who won. The libraries are imported where an environment is made.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from aem_lightning.envs.base import RESERVED_INFO_KEYS, Reset, Step, import_extra
from aem_lightning.envs.questions import QuestionEnv, outcome, task_number


class GymnasiumEnv:
    """Any environment id of Gymnasium whose observations are text.

    Args:
        env_id: As for ``gymnasium.make``; ``my_package:MyEnv-v0`` imports the package first.
        action_names: A word for each action of a discrete action space, in its order.
        describe: Makes text of observations that are none.
        win_at: The last reward of a win, unless ``info`` has ``won`` or ``is_success``.
        arguments: More for ``gymnasium.make``.

    Raises:
        ValueError: Actions that are neither text nor discrete with a name each.
    """

    def __init__(
        self,
        env_id: str,
        *,
        action_names: Sequence[str] | None = None,
        describe: Callable[[Any], str] | None = None,
        win_at: float = 1.0,
        **arguments: Any,
    ) -> None:
        gymnasium = import_extra("gymnasium", "gymnasium")
        # Its checker takes text for wrong that has a character beyond letters and digits.
        self._env = gymnasium.make(env_id, disable_env_checker=True, **arguments)
        space = self._env.action_space
        self._names = tuple(action_names or ())
        self._first = int(getattr(space, "start", 0))
        self._describe, self._win_at, self._env_id = describe, win_at, env_id
        if isinstance(space, gymnasium.spaces.Discrete) and len(self._names) != space.n:
            raise ValueError(
                f"{env_id} has {space.n} actions and action_names={list(self._names)}: give each a "
                "name, e.g. datamodule.action_names=[left,down,right,up]"
            )
        if not isinstance(space, gymnasium.spaces.Discrete | gymnasium.spaces.Text):
            raise ValueError(f"{env_id} acts by {space}; allowed: Text, or Discrete with names")

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> Reset:
        """Start with the task's number as Gymnasium's seed."""
        observation, info = self._env.reset(seed=task_number(options))
        self._task_id = str((options or {})["task_id"])
        self._seen = self._text(observation)
        return self._seen, self._info(info)

    def step(self, action: str, /) -> Step:
        """An action that has no name is not played: nothing changes."""
        if self._names and action not in self._names:
            return self._seen, 0.0, False, False, self._info({"is_action_valid": False})
        move = self._names.index(action) + self._first if self._names else action
        observation, reward, terminated, truncated, info = self._env.step(move)
        self._seen = self._text(observation)
        won = bool(info.get("is_success", terminated and reward >= self._win_at))
        known = self._info({"is_action_valid": True, "won": won, **info})
        return self._seen, float(reward), bool(terminated), bool(truncated), known

    def close(self) -> None:
        """Close Gymnasium's environment."""
        self._env.close()

    def _text(self, observation: Any) -> str:
        text = observation if self._describe is None else self._describe(observation)
        if not isinstance(text, str):
            raise TypeError(
                f"{self._env_id} shows {text!r}, which is no text: give datamodule.describe, a "
                "function from an observation to text"
            )
        return text

    def _info(self, info: Mapping[str, Any]) -> dict[str, Any]:
        known = {name: info[name] for name in RESERVED_INFO_KEYS if name in info}
        return {"admissible_actions": self._names, **known, "task_id": self._task_id}


class TextArenaEnv:
    """A game of TextArena for one player.

    Every episode is a new game object: the wrappers of version 0.7 go on with the history of the
    episode before. Games draw from Python's global random stream. Each environment has its own, so
    that many can be played in turn in one process.

    Args:
        env_id: As for ``textarena.make``, e.g. ``GuessTheNumber-v0``.
        win_at: The reward of a win.
        arguments: More for ``textarena.make``.

    Raises:
        ValueError: There is no such game, it is one for several players, or it does not start.
    """

    def __init__(self, env_id: str, *, win_at: float = 1.0, **arguments: Any) -> None:
        library = import_extra("textarena", "adapters")
        self._make = partial(library.make, env_id, **arguments)
        self._win_at = win_at
        self._stream: Any = random.Random(0).getstate()
        self._env: Any = None
        reason = ""
        with self._own_stream():  # some games fail at a reset only, for want of a file or a key
            try:
                self._env = self._make()
                self._env.reset(num_players=1, seed=0)
            except Exception as error:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        # Of several players' games not all notice that there is one.
        state = getattr(self._env, "state", None)
        alone = getattr(library, "SinglePlayerState", object)
        if state is not None and not isinstance(state, alone):
            reason = "it is a game for several players"
        if reason:
            raise ValueError(
                f"env_id={env_id!r} cannot be played by one player ({reason}); allowed: the games "
                "of TextArena for one, e.g. datamodule.env.env_id=GuessTheNumber-v0"
            )

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> Reset:
        """Start with the task's number as TextArena's seed."""
        number = task_number(options)
        self._known = {"task_id": str((options or {})["task_id"])}
        self._stream = random.Random(number).getstate()
        with self._own_stream():
            self._env = self._make()
            self._env.reset(num_players=1, seed=number)
            return self._observation(), dict(self._known)

    def step(self, action: str, /) -> Step:
        """A move; the game says in its own words where it was none."""
        with self._own_stream():
            done, _ = self._env.step(action=action)
            text = self._observation()
            errors = getattr(self._env.state, "error_count", 0)
            if not done:
                return text, 0.0, False, False, self._known | {"is_action_valid": not errors}
            rewards, game = self._env.close()
        valid = not game.get(0, {}).get("invalid_move", False)
        reward, ended = outcome((rewards or {}).get(0, 0.0), self._win_at)
        ended = {"is_action_valid": valid, **ended, "won": valid and ended["won"]}
        return text, reward, True, False, self._known | ended

    def close(self) -> None:
        """Nothing is held."""

    def _observation(self) -> Any:
        _, seen = self._env.get_observation()
        return "\n".join(m[1] for m in seen) if isinstance(seen, list | tuple) else seen

    @contextlib.contextmanager
    def _own_stream(self) -> Iterator[None]:
        outer = random.getstate()
        random.setstate(self._stream)
        try:
            yield
        finally:
            self._stream = random.getstate()
            random.setstate(outer)


class ReasoningGymEnv:
    """A data set of reasoning-gym: one question, one answer, and its score as the reward.

    Args:
        name: As for ``reasoning_gym.create_dataset``, e.g. ``chain_sum``.
        seed: Another seed gives other questions.
        size: More than there are tasks.
        win_at: The score of a win.
        arguments: More for ``create_dataset``.
    """

    def __init__(
        self,
        name: str,
        *,
        seed: int = 0,
        size: int = 1_000_000,
        win_at: float = 1.0,
        **arguments: Any,
    ) -> None:
        library = import_extra("reasoning_gym", "adapters")
        questions = library.create_dataset(name, seed=seed, size=size, **arguments)
        self._env = QuestionEnv(questions, name, win_at)

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> Reset:
        """The question of the task's number."""
        return self._env.reset(seed=seed, options=options)

    def step(self, action: str, /) -> Step:
        """The score of an answer; the episode ends."""
        return self._env.step(action)

    def close(self) -> None:
        """Nothing is held."""


class OpenEnvEnv:
    """An environment behind an OpenEnv server, over its generic client.

    Fields of an observation that are called as ``info``'s reserved keys are taken for them:
    `openenv_server` sends them.

    Args:
        base_url: Where the server listens.
        action_field: The field of an action that holds the text.
        observation_field: The field of an observation that is shown.
        win_at: The last reward of a win.
        make_client: Makes a client of a URL; by default OpenEnv's generic one.
    """

    def __init__(
        self,
        base_url: str,
        *,
        action_field: str = "message",
        observation_field: str = "text",
        win_at: float = 1.0,
        make_client: Callable[[str], Any] | None = None,
    ) -> None:
        make = make_client or import_extra("openenv.core", "adapters").GenericEnvClient
        client = make(base_url)
        # From 0.2.2 on the client is asynchronous and hands out a synchronous one.
        self._client = getattr(client, "sync", lambda: client)()
        self._action_field, self._observation_field = action_field, observation_field
        self._win_at = win_at

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> Reset:
        """Start with the task's number as the server's seed."""
        result = self._client.reset(seed=task_number(options))
        self._known = {"task_id": str((options or {})["task_id"])}
        return self._text(result.observation), self._info(result.observation)

    def step(self, action: str, /) -> Step:
        """The server's answer to an action."""
        result = self._client.step({self._action_field: action})
        reward, done = float(result.reward or 0.0), bool(result.done)
        info = {"won": done and reward >= self._win_at, **self._info(result.observation)}
        cut = done and bool(result.observation.get("truncated"))
        return self._text(result.observation), reward, done and not cut, cut, info

    def _info(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """The reserved keys that the server sends; the task's name is ours."""
        known = {n: v for n in RESERVED_INFO_KEYS if (v := observation.get(n)) is not None}
        if isinstance(known.get("admissible_actions"), list):  # JSON has no tuples
            known["admissible_actions"] = tuple(known["admissible_actions"])
        return known | self._known

    def close(self) -> None:
        """End the session."""
        self._client.close()

    def _text(self, observation: Mapping[str, Any]) -> str:
        if self._observation_field not in observation:
            raise ValueError(
                f"the server's observations have no {self._observation_field!r}; type "
                f"datamodule.env.observation_field=<one of {', '.join(sorted(observation))}>"
            )
        return str(observation[self._observation_field])
