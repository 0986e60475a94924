"""What an environment answers, checked where it enters: in its worker, and behind the wire."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from aem_lightning.types import EnvStep

RESET = ("observation", "info")
STEP = ("observation", "reward", "terminated", "truncated", "info")
LARGEST = 3.4e38  # of a reward or score: tensors are float32

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 200
_short.maxtuple = _short.maxlist = _short.maxdict = 8


class BadAnswerError(ValueError):
    """An environment returned what its contract does not allow; the message says what and where."""


def checked_answer(
    result: Any, names: tuple[str, ...], *, task_id: str | None = None, uses_reward: bool = True
) -> EnvStep:
    """What ``reset`` or ``step`` returned, in Python's own types.

    Scalars of numpy become Python's, admissible actions a tuple. Keys of ``info`` that are not
    reserved are left as they are.

    Args:
        result: What was returned.
        names: `RESET` or `STEP`.
        task_id: The task in play, where it is known.
        uses_reward: Without it the reward is not looked at, and one that is no number is 0.

    Raises:
        BadAnswerError: ``<name>=<value>; expected ...``.
    """
    if not isinstance(result, tuple | list) or len(result) != len(names):
        raise BadAnswerError(f"{_shown(result)}; expected a tuple ({', '.join(names)})")
    observation, *rest, info = result
    reward, terminated, truncated = rest or (0.0, False, False)
    if not uses_reward and not _is_finite(reward):
        reward = 0.0
    return EnvStep(
        _text("observation", observation),
        _number("reward", reward),
        _flag("terminated", terminated),
        _flag("truncated", truncated),
        _info(info, task_id),
    )


def _info(given: Any, task_id: str | None) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise BadAnswerError(f"info={_shown(given)}; expected dict")
    info = dict(given)
    for key, name, check in _CHECKS:
        if key in info:
            info[key] = check(name, info[key])
    if task_id is not None and info.get("task_id", task_id) != task_id:
        raise BadAnswerError(f"info['task_id']={_shown(info['task_id'])}; expected {task_id!r}")
    return info


def _texts(name: str, value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    try:
        if not isinstance(value, tuple | list):
            raise TypeError
        _text(name, "\n".join(value))
    except TypeError:
        raise BadAnswerError(f"{name}={_shown(value)}; expected a tuple of str") from None
    return tuple(value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise BadAnswerError(f"{name}={_shown(value)}; expected str")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            place = slice(max(0, error.start - 20), error.start + 20)
            raise BadAnswerError(
                f"{name}={value[place]!r} (from character {place.start} on); expected text without "
                "half a surrogate pair, which no tokenizer reads"
            ) from None
    return value


def _reason(name: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise BadAnswerError(f"{name}={_shown(value)}; expected str or None")
    return None if value is None else printable(value)


def _flag(name: str, value: Any) -> bool:
    if value is True or value is False:
        return value
    value = _plain(value)
    if not isinstance(value, bool):
        raise BadAnswerError(f"{name}={_shown(value)}; expected bool")
    return value


def _number(name: str, value: Any) -> float:
    if type(value) is float and -LARGEST <= value <= LARGEST:
        return value
    if not _is_finite(value):
        kind = "a finite number" if isinstance(_plain(value), Real) else "a number"
        raise BadAnswerError(f"{name}={_shown(value)}; expected {kind}")
    value = _plain(value)
    return value if isinstance(value, int | float) else float(value)


def _is_finite(value: Any) -> bool:
    """Whether it is a number that a tensor holds; NaN is not."""
    number = _plain(value)
    known = isinstance(number, (int, float, Real))  # the first two for their speed
    return known and bool(-LARGEST <= number <= LARGEST)


def _plain(value: Any) -> Any:
    """A scalar of numpy as Python's own; numpy itself is not imported."""
    if type(value) in (bool, float, int) or getattr(value, "shape", None) != ():
        return value
    return value.item()


_OF_INFO: dict[str, Callable[[str, Any], Any]] = {
    "task_id": _text,
    "goal": _text,
    "admissible_actions": _texts,
    "is_action_valid": _flag,
    "score": _number,
    "won": _flag,
    "infra_error": _reason,
}
_CHECKS = [(key, f"info[{key!r}]", check) for key, check in _OF_INFO.items()]


def printable(text: str) -> str:
    """``text`` with halves of surrogate pairs written out, so that any log can hold it."""
    return text.encode(errors="backslashreplace").decode()


def _shown(value: Any) -> str:
    try:
        return printable(_short.repr(value))
    except Exception:  # the environment's own __repr__
        return f"<{type(value).__name__}>"
