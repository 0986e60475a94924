"""The contract of an environment, as a check that anyone can run on theirs."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Sequence
from typing import Any

from aem_lightning.envs.base import EnvContractError, TextEnv
from aem_lightning.types import Task

NONSENSE = "xyzzy the quux"
RESULTS = ("observation", "reward", "terminated", "truncated", "info")
TYPES: tuple[type | tuple[type, ...], ...] = (str, (int, float), bool, bool, dict)


def check_env(
    make_env: Callable[[], TextEnv], tasks: Sequence[Task], *, seed: int = 0, turns: int = 8
) -> None:
    """Prove that an environment keeps the contract of `TextEnv`.

    For every task: two copies start alike and answer the same actions alike; every admissible
    action is accepted, nonsense is marked by ``is_action_valid=False``; a reset in the middle of an
    episode and one after an exception lead back to the start. The factory can be pickled, and
    ``close`` called twice.

    Args:
        make_env: Makes one environment.
        tasks: Tasks to try.
        seed: Seed given to ``reset``, and of the actions tried.
        turns: Actions tried in each task.

    Raises:
        EnvContractError: Every breach found: the method, what it returned, and what was expected.
        ValueError: There are no tasks to try.
    """
    if not tasks:
        raise ValueError("check_env got no tasks; give at least one")
    breaches = _check_factory(make_env) + _check_ids(tasks)
    first, second = make_env(), make_env()
    for task in tasks:
        try:
            _Trial(first, second, task, seed, turns, breaches).run()
        except Exception as error:
            breaches.append(f"task {task.id!r}: raised {type(error).__name__}: {error}")
    for env in (first, second, first):
        try:
            env.close()
        except Exception as error:
            breaches.append(f"close() raised {type(error).__name__}: {error}; expected: no effect")
    if breaches:
        raise EnvContractError(
            f"{len(breaches)} breaches of the TextEnv contract:\n- " + "\n- ".join(breaches)
        )


def _check_factory(make_env: Callable[[], TextEnv]) -> list[str]:
    try:
        pickle.loads(pickle.dumps(make_env))
    except Exception as error:
        return [
            f"make_env={make_env!r} cannot be pickled ({error}); expected: a class or function of "
            "an importable module, or a functools.partial of one"
        ]
    return []


def _check_ids(tasks: Sequence[Task]) -> list[str]:
    ids = [task.id for task in tasks]
    twice = sorted({i for i in ids if ids.count(i) > 1})
    return [f"task ids given more than once: {twice}; expected: unique ids"] if twice else []


class _Stop(Exception):  # noqa: N818 (not an error: the trial of a task ends here)
    """What follows would only repeat the last breach."""


class _Trial:
    """Two copies of one task, side by side."""

    def __init__(
        self,
        env: TextEnv,
        copy: TextEnv,
        task: Task,
        seed: int,
        turns: int,
        breaches: list[str],
    ) -> None:
        self._env, self._copy, self._task = env, copy, task
        self._seed, self._turns, self._breaches = seed, turns, breaches

    def run(self) -> None:
        try:
            start = self._reset(self._env)
            self._compare("reset() of a second copy", self._reset(self._copy), start)
            self._play(start)
            self._compare("reset() in the middle of an episode", self._reset(self._env), start)
            self._check_nonsense(start)
            self._provoke()
            self._compare("reset() after an exception", self._reset(self._env), start)
        except _Stop:
            return

    def _report(self, text: str) -> None:
        self._breaches.append(f"task {self._task.id!r}: {text}")

    def _compare(self, what: str, found: Any, expected: Any) -> None:
        if found != expected:
            self._report(f"{what} returned {found!r}; expected, as the first time: {expected!r}")
            raise _Stop

    def _reset(self, env: TextEnv) -> tuple[str, dict[str, Any]]:
        result = env.reset(seed=self._seed, options={"task_id": self._task.id})
        self._check_types("reset", result, ("observation", "info"), (str, dict))
        if result[1].get("task_id", self._task.id) != self._task.id:
            self._report(
                f"reset() returned info['task_id']={result[1]['task_id']!r}; expected "
                f"{self._task.id!r}"
            )
        self._check_admissible("reset", result[1])
        return result

    def _step(self, env: TextEnv, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        result = env.step(action)
        self._check_types(f"step({action!r})", result, RESULTS, TYPES)
        self._check_admissible(f"step({action!r})", result[-1])
        return result

    def _check_types(
        self, method: str, result: Any, names: Sequence[str], types: Sequence[Any]
    ) -> None:
        if not isinstance(result, tuple) or len(result) != len(names):
            self._report(f"{method} returned {result!r}; expected a tuple ({', '.join(names)})")
            raise _Stop
        for name, value, kind in zip(names, result, types, strict=True):
            if not isinstance(value, kind):
                kinds = kind if isinstance(kind, tuple) else (kind,)
                wanted = " or ".join(k.__name__ for k in kinds)
                self._report(f"{method} returned {name}={value!r}; expected {wanted}")
                raise _Stop

    def _check_admissible(self, method: str, info: dict[str, Any]) -> None:
        actions = info.get("admissible_actions", ())
        if not isinstance(actions, list | tuple) or not all(isinstance(a, str) for a in actions):
            self._report(
                f"{method} returned info['admissible_actions']={actions!r}; expected a tuple of str"
            )
            raise _Stop

    def _play(self, start: tuple[str, dict[str, Any]]) -> None:
        """Walk at random among the admissible actions, with both copies."""
        rng = random.Random(self._seed)
        info = start[1]
        for _ in range(self._turns):
            actions = info.get("admissible_actions") or (NONSENSE,)
            action = rng.choice(sorted(actions))
            result = self._step(self._env, action)
            self._compare(
                f"step({action!r}) of a second copy", self._step(self._copy, action), result
            )
            _, _, terminated, truncated, info = result
            if action != NONSENSE and not info.get("is_action_valid", True):
                self._report(
                    f"step({action!r}) returned info['is_action_valid']=False; expected True, "
                    "since the action was among info['admissible_actions']"
                )
            if terminated or truncated:
                return

    def _check_nonsense(self, start: tuple[str, dict[str, Any]]) -> None:
        """Without a list of admissible actions, any text may be a valid action."""
        info = self._step(self._env, NONSENSE)[-1]
        if start[1].get("admissible_actions") and info.get("is_action_valid") is not False:
            self._report(
                f"step({NONSENSE!r}) returned info['is_action_valid']="
                f"{info.get('is_action_valid')!r}; expected False, since the action is not among "
                "info['admissible_actions']"
            )

    def _provoke(self) -> None:
        """Make the environment raise, if it will."""
        try:
            self._env.step(None)  # type: ignore[arg-type]
        except Exception:
            return
