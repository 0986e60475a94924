"""Questions with a checker as environments: one answer, or calls of tools before it."""

from __future__ import annotations

import json
import pickle
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from aem_lightning.envs.answers import BadAnswerError
from aem_lightning.envs.base import Reset, Step

ANSWER = "final_answer"
LONGEST = 4000  # characters of what a tool gave that are shown


class Questions(Protocol):
    """Numbered questions and their checker, as reasoning-gym's data sets have them."""

    def __getitem__(self, number: int, /) -> Any:
        """The entry of a number, whose text stands under ``question``."""
        ...

    def score_answer(self, answer: str, entry: Any) -> Any:
        """How good ``answer`` is."""
        ...


@dataclass(frozen=True)
class Rows:
    """Rows in a file, read one at a time: a worker takes little, whatever the data's size.

    Attributes:
        path: The file, of pickled entries ``{"question": ..., "row": ...}``.
        offsets: Where each begins.
        score: From row and answer to a number.
    """

    path: str
    offsets: array[int]
    score: Callable[..., Any]

    def __getitem__(self, number: int, /) -> dict[str, Any]:
        with open(self.path, "rb") as file:
            file.seek(self.offsets[number])
            entry: dict[str, Any] = pickle.load(file)
        return entry

    def score_answer(self, answer: str, entry: Mapping[str, Any], *more: Any) -> Any:
        """What the function makes of it."""
        return self.score(entry["row"], answer, *more)


class QuestionEnv:
    """One question, one answer, and its score as the reward.

    Args:
        questions: Where the task's number is looked up.
        name: What they are called where a checker raises.
        win_at: The score of a win.
    """

    def __init__(self, questions: Questions, name: str, win_at: float = 1.0) -> None:
        self._questions, self._name, self._win_at = questions, name, win_at

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> Reset:
        """The question of the task's number."""
        self._entry = self._questions[task_number(options)]
        self._known = {"task_id": str((options or {})["task_id"])}
        return self._entry["question"], dict(self._known)

    def step(self, action: str, /) -> Step:
        """The score of an answer; the episode ends.

        Raises:
            BadAnswerError: The checker raised.
        """
        return self.scored(action)

    def scored(self, answer: str, *more: Any) -> Step:
        """The end of an episode with ``answer``; the checker is given ``more``, too."""
        try:
            score = self._questions.score_answer(answer, self._entry, *more)
        except Exception as error:  # some read no answers but those of their own form
            raise BadAnswerError(
                f"no score: the checker of {self._name} raised {type(error).__name__}: {error} on "
                f"the answer {answer[:100]!r}; expected a number"
            ) from error
        reward, ended = outcome(score, self._win_at)
        return "", reward, True, False, self._known | ended

    def close(self) -> None:
        """Nothing is held."""


class ToolsEnv:
    """A question, calls of tools, and a last call that answers it.

    What a tool raises is an observation, as is what it returns: text, else JSON.

    Args:
        questions: As for `QuestionEnv`; the checker is given the calls, too.
        name: As for `QuestionEnv`.
        tools: The functions.
        win_at: The score of a win.
    """

    def __init__(
        self,
        questions: Questions,
        name: str,
        tools: Sequence[Callable[..., Any]],
        win_at: float = 1.0,
    ) -> None:
        self._asked = QuestionEnv(questions, name, win_at)
        self._tools = {tool.__name__: tool for tool in tools}

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> Reset:
        """The question of the task's number."""
        observation, known = self._asked.reset(seed=seed, options=options)
        self._calls: list[dict[str, Any]] = []
        self._known = {**known, "goal": observation}
        return observation, dict(self._known)

    def step(self, action: str, /) -> Step:
        """What the tool of a call gave; the score of a call that answers.

        Raises:
            BadAnswerError: The checker raised.
        """
        call = _call(action)
        if call is None:
            text = f"No tool was called. Call one of {', '.join(self._tools)}, or {ANSWER}."
            return text, 0.0, False, False, self._known | {"is_action_valid": False}
        name, arguments = call
        if name == ANSWER:
            return self._asked.scored(str(arguments.get("answer", "")), list(self._calls))
        try:
            given, failed = self._tools[name](**arguments), False
        except Exception as error:  # the policy is told, and may do better
            given, failed = f"{type(error).__name__}: {error}", True
        self._calls.append({"name": name, "arguments": arguments, "result": given})
        return _shown(given), 0.0, False, False, self._known | {"is_action_valid": not failed}

    def close(self) -> None:
        """Nothing is held."""


def _shown(given: Any) -> str:
    """What a tool gave as a text that can be read: itself, else JSON where that can say it."""
    try:
        is_text = isinstance(given, str)
        text = given if is_text else json.dumps(given, default=str, ensure_ascii=False)
    except (TypeError, ValueError):  # keys that JSON lacks, a list in itself
        text = str(given)
    text = text.encode(errors="replace").decode()
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def _call(action: str) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments of a call as JSON, or none."""
    try:
        call = json.loads(action)
        return str(call["name"]), dict(call["arguments"])
    except (ValueError, LookupError, TypeError):
        return None


def task_number(options: Mapping[str, Any] | None) -> int:
    """The number of the task that ``reset`` is asked for.

    Raises:
        ValueError: The task id does not end in a number.
    """
    task_id = str((options or {}).get("task_id"))
    number = task_id.rpartition("/")[2]
    if not number.isdecimal():
        raise ValueError(f"task_id={task_id!r}: a number behind a split, e.g. 'train/7'")
    return int(number)


def outcome(value: Any, win_at: float) -> tuple[Any, dict[str, Any]]:
    """A reward and what ``info`` says of it; what is no number stays, to be refused as it is."""
    if not hasattr(value, "__float__"):
        return value, {"won": False}
    return float(value), {"won": float(value) >= win_at, "score": float(value)}
