"""What an environment answers, checked where it enters: in its worker, and behind the wire."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
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
    found = dict(zip(names, result, strict=True))
    reward = found.get("reward", 0.0)
    if uses_reward or _is_finite(reward):
        reward = _number("reward", reward)
    return EnvStep(
        _text("observation", found["observation"]),
        reward if _is_finite(reward) else 0.0,
        _flag("terminated", found.get("terminated", False)),
        _flag("truncated", found.get("truncated", False)),
        _info(found["info"], task_id),
    )


def _info(given: Any, task_id: str | None) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise BadAnswerError(f"info={_shown(given)}; expected dict")
    info = dict(given)
    for name in ("task_id", "goal"):
        if name in info:
            info[name] = _text(f"info[{name!r}]", info[name])
    if task_id is not None and info.get("task_id", task_id) != task_id:
        raise BadAnswerError(f"info['task_id']={_shown(info['task_id'])}; expected {task_id!r}")
    for name in ("is_action_valid", "won"):
        if name in info:
            info[name] = _flag(f"info[{name!r}]", info[name])
    if "score" in info:
        info["score"] = _number("info['score']", info["score"])
    if info.get("infra_error") is not None:
        reason = info["infra_error"]
        if not isinstance(reason, str):
            raise BadAnswerError(f"info['infra_error']={_shown(reason)}; expected str or None")
        info["infra_error"] = printable(reason)
    actions = info.get("admissible_actions")
    if actions is not None:
        info["admissible_actions"] = _texts("info['admissible_actions']", actions)
    return info


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, tuple | list) or not all(isinstance(text, str) for text in value):
        raise BadAnswerError(f"{name}={_shown(value)}; expected a tuple of str")
    _text(name, "\n".join(value))
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


def _flag(name: str, value: Any) -> bool:
    value = _plain(value)
    if not isinstance(value, bool):
        raise BadAnswerError(f"{name}={_shown(value)}; expected bool")
    return value


def _number(name: str, value: Any) -> float:
    if not _is_finite(value):
        kind = "a finite number" if isinstance(_plain(value), Real) else "a number"
        raise BadAnswerError(f"{name}={_shown(value)}; expected {kind}")
    value = _plain(value)
    return value if isinstance(value, int | float) else float(value)


def _is_finite(value: Any) -> bool:
    value = _plain(value)
    return isinstance(value, Real) and bool(-LARGEST <= value <= LARGEST)  # type: ignore[operator]


def _plain(value: Any) -> Any:
    """A scalar of numpy as Python's own; numpy itself is not imported."""
    return value.item() if getattr(value, "shape", None) == () else value


def printable(text: str) -> str:
    """``text`` with halves of surrogate pairs written out, so that any log can hold it."""
    return text.encode(errors="backslashreplace").decode()


def _shown(value: Any) -> str:
    try:
        return printable(_short.repr(value))
    except Exception:  # the environment's own __repr__
        return f"<{type(value).__name__}>"
