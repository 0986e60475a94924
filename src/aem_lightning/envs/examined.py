"""An environment under examination: the part in its worker, and the one that asks from outside.

The worker's part tells what is wrong with the environment in place of breaking for it, so that one
and the same object can be tried on after it raised. The pool between the two waits for no answer
longer than its ``timeout_s``.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from aem_lightning.envs.answers import RESET, STEP, BadAnswerError, checked_answer
from aem_lightning.envs.base import EnvContractError, Reset, Step, TextEnv
from aem_lightning.envs.imports import ImportWatch
from aem_lightning.envs.leaks import held
from aem_lightning.envs.pool import EnvPool
from aem_lightning.types import EnvStep, ResetRequest

MAKE, CLOSE, RAISE = "\0make", "\0close", "\0raise"  # wishes, in place of a task or an action
EXAMINED = "examined"


class EnvBreach(Exception):  # noqa: N818 (not an error of ours)
    """A call of the environment raised, or returned what the contract does not allow."""


class EnvLost(Exception):  # noqa: N818 (not an error of ours)
    """A call of the environment did not come back.

    Attributes:
        reason: What the pool says to that.
    """

    def __init__(self, call: str, reason: str) -> None:
        super().__init__(f"{call} gave no answer: {reason}; expected: one")
        self.reason = reason


class ExaminedEnv:
    """The worker's part: answers as the environment does, and says what is wrong in ``info``.

    Args:
        factory: The pickled factory; its module is imported under watch.

    Raises:
        EnvContractError: What the factory makes is no environment, or no new one.
    """

    made: ClassVar[list[Any]] = []

    def __init__(self, factory: bytes) -> None:
        self._watch = ImportWatch()
        sys.meta_path.insert(0, self._watch)
        env = pickle.loads(factory)()
        if any(env is other for other in self.made):
            raise EnvContractError(
                "make_env() returned one object twice; expected: a new one each time"
            )
        if not isinstance(env, TextEnv):
            missing = [name for name in ("reset", "step", "close") if not hasattr(env, name)]
            raise EnvContractError(
                f"make_env() returned {env!r} without {', '.join(missing)}; expected: an object "
                "with reset, step and close"
            )
        self.made.append(env)
        self._env = env

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> Reset:
        task_id = (options or {})["task_id"]
        if task_id in (MAKE, CLOSE):
            wish: Callable[[], Any] = self._close_twice if task_id == CLOSE else lambda: ("", {})
            observation, *_, info = self._told("close()", wish, RESET)
        else:
            call = lambda: self._env.reset(seed=seed, options=options)  # noqa: E731
            observation, *_, info = self._told("reset", call, RESET, task_id)
        return observation, info

    def step(self, action: str, /) -> Step:
        given: Any = None if action == RAISE else action
        return self._told(f"step({given!r})", lambda: self._env.step(given), STEP)

    def close(self) -> None:
        self._env.close()

    def counters(self) -> dict[str, int]:
        """What this process holds."""
        return held()

    def _close_twice(self) -> Reset:
        self._env.close()
        self._env.close()
        return "", {}

    def _told(
        self, call: str, make: Callable[[], Any], names: tuple[str, ...], task_id: str | None = None
    ) -> Step:
        breach, step = None, EnvStep("", truncated=True)
        try:
            step = checked_answer(make(), names, task_id=task_id)
        except BadAnswerError as error:
            breach = f"{call} returned {error}"
        except Exception as error:
            breach = f"{call} raised {type(error).__name__}: {error}"
        told = {"breach": breach, "imports": self._watch.found()}
        info = {**step.info, EXAMINED: told}
        return step.observation, step.reward, step.terminated, step.truncated, info


class RemoteEnv:
    """The part outside: an environment in a worker, as if it were here.

    Args:
        pool: Of `ExaminedEnv`.
        key: Its episodes' own.

    Attributes:
        imports: Heavy packages by the line that loads them.
        paid: Answers with a reward or a win, one of each kind.
    """

    def __init__(self, pool: EnvPool, key: str) -> None:
        self._pool, self._key = pool, key
        self.imports: dict[str, list[str]] = {}
        self.paid: dict[tuple[float, bool], EnvStep] = {}

    def make(self) -> None:
        """Let it be made, where it is not yet.

        Raises:
            Exception: What making it raised.
        """
        self.reset(options={"task_id": MAKE})

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> Reset:
        """As the environment's own.

        Raises:
            EnvBreach: What is wrong with the answer.
            EnvLost: There is none.
        """
        request = ResetRequest((options or {})["task_id"], seed or 0)
        observation, *_, info = self._asked("reset", self._pool.reset({self._key: request}))
        return observation, info

    def step(self, action: str, /) -> Step:
        """The same; `RAISE` sends ``None``."""
        call = "step(None)" if action == RAISE else f"step({action!r})"
        return self._asked(call, self._pool.step({self._key: action}))

    def close(self) -> None:
        """Close it twice."""
        self.reset(options={"task_id": CLOSE})

    def _asked(self, call: str, answers: Mapping[str, EnvStep]) -> Step:
        step = answers[self._key]
        if EXAMINED not in step.info:  # the pool's word
            raise EnvLost(call, str(step.infra_error))
        info = dict(step.info)
        told = info.pop(EXAMINED)
        self.imports = told["imports"]
        if told["breach"] is not None:
            raise EnvBreach(told["breach"])
        if step.reward or step.won:
            self.paid.setdefault((step.reward, step.won), step)
        return step.observation, step.reward, step.terminated, step.truncated, info
