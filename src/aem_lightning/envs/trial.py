"""The trial of one task: two copies of an environment, side by side."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from typing import Any, Protocol

from aem_lightning.envs.base import Reset, Step, TextEnv
from aem_lightning.envs.examined import RAISE, EnvBreach
from aem_lightning.types import Task

NONSENSE = "xyzzy the quux"


class ActionWords(Protocol):
    """How an action is written as a response, and read from one; a `Prompt` is one."""

    @property
    def demonstration(self) -> str:
        """A template with ``{action}``, and with ``{thought}`` where experts tell theirs."""
        ...

    def parse(self, response: str) -> str | None:
        """The action in ``response``, or ``None`` where it is malformed."""
        ...


class Breach(Exception):  # noqa: N818 (not an error: the trial of a task ends here)
    """What follows would only repeat the last breach."""


class Trial:
    """Two copies of one task, side by side; what is wrong joins ``breaches``.

    Args:
        envs: Two environments of one factory.
        task: The task to try.
        seed: Seed given to ``reset``, and of the actions tried.
        turns: Actions tried.
        breaches: Where breaches are told.
        prompt: How actions are written, where malformed responses are to be tried too.
    """

    def __init__(
        self,
        envs: Sequence[TextEnv],
        task: Task,
        seed: int,
        turns: int,
        breaches: list[str],
        prompt: ActionWords | None = None,
    ) -> None:
        self._env, self._copy = envs
        self.task = task
        self._seed, self._turns, self._breaches = seed, turns, breaches
        self._prompt = prompt

    def run(self) -> Reset | None:
        """Try everything; the start state, where the environment gave one.

        Raises:
            EnvLost: A call did not come back.
        """
        start = None
        try:
            start = self.reset(self._env)
            self._compare("reset() of a second copy", self.reset(self._copy), start)
            self._play(start)
            self._compare("reset() in the middle of an episode", self.reset(self._env), start)
            self._check_refusals(start)
            self._check_words(start)
            with contextlib.suppress(EnvBreach):  # make it raise, if it will
                self._env.step(RAISE)
            self._compare("reset() after an exception", self.reset(self._env), start)
        except Breach:
            pass
        except EnvBreach as breach:
            self._report(str(breach))
        return start

    def _report(self, text: str) -> None:
        self._breaches.append(f"task {self.task.id!r}: {text}")

    def _compare(self, what: str, found: Any, expected: Any) -> None:
        if found != expected:
            seen, wanted = excerpts(repr(found), repr(expected))
            self._report(f"{what} returned {seen}; expected, as the first time: {wanted}")
            raise Breach

    def reset(self, env: TextEnv) -> Reset:
        """The start state."""
        return env.reset(seed=self._seed, options={"task_id": self.task.id})

    def step(self, env: TextEnv, action: str) -> Step:
        """The answer to ``action``."""
        return env.step(action)

    def _play(self, start: Reset) -> None:
        """Walk at random among the admissible actions, with both copies."""
        rng = random.Random(self._seed)
        info = start[1]
        for _ in range(self._turns):
            action = pick(rng, info)
            result = self.step(self._env, action)
            self._compare(
                f"step({action!r}) of a second copy", self.step(self._copy, action), result
            )
            _, _, terminated, truncated, info = result
            if action != NONSENSE and not info.get("is_action_valid", True):
                self._report(
                    f"step({action!r}) returned info['is_action_valid']=False; expected True, "
                    "since the action was among info['admissible_actions']"
                )
            if terminated or truncated:
                return

    def _check_refusals(self, start: Reset) -> None:
        """Nonsense, and the nothing that an empty response sends; each from the start state.

        Without a list of admissible actions, any text may be a valid action.
        """
        for action in (NONSENSE, ""):
            info = self.step(self._env, action)[-1]
            if start[1].get("admissible_actions") and info.get("is_action_valid") is not False:
                self._report(
                    f"step({action!r}) returned info['is_action_valid']="
                    f"{info.get('is_action_valid')!r}; expected False, since the action is not "
                    "among info['admissible_actions']"
                )
            self.reset(self._env)

    def _check_words(self, start: Reset) -> None:
        """What is malformed and what is inadmissible are two things, by the prompt's own word."""
        if self._prompt is None:
            return
        found = self._prompt.parse("")
        if found is not None:
            self._report(
                f"prompt.parse('') returned {found!r}; expected None, since a response without an "
                "action is malformed"
            )
        for action in (NONSENSE, *(start[1].get("admissible_actions") or ())):
            write = getattr(self._prompt, "demonstrated", None)  # a call has its own spelling
            plain = self._prompt.demonstration.format(action=action, thought="")
            response = str(write(action)) if write else plain
            found = self._prompt.parse(response)
            if found != action:
                kind = "inadmissible, not malformed" if action == NONSENSE else "admissible"
                self._report(
                    f"prompt.parse({response!r}) returned {found!r}; expected {action!r}, which is "
                    f"{kind}"
                )


def pick(rng: random.Random, info: dict[str, Any]) -> str:
    """An admissible action, or nonsense where none is listed."""
    actions: Sequence[str] = info.get("admissible_actions") or (NONSENSE,)
    return rng.choice(sorted(actions))


def excerpts(one: str, other: str, width: int = 300) -> list[str]:
    """Two texts, cut to ``width`` characters around where they first differ."""
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
    start = max(0, same - width // 3)
    return [
        ("..." if start and len(text) > width else "")
        + (text if len(text) <= width else text[start : start + width])
        + ("..." if len(text) > start + width else "")
        for text in (one, other)
    ]
