"""Exceptions of a worker, told and raised again without a pickle: by name, from a closed list."""

from __future__ import annotations

import builtins
import traceback
from typing import Any

from aem_lightning.envs.answers import printable
from aem_lightning.envs.base import EnvContractError, EnvPoolError, MissingExtraError
from aem_lightning.envs.orders import Broken

OURS = {kind.__name__: kind for kind in (EnvContractError, EnvPoolError, MissingExtraError)}
TEXT = 20_000  # characters of a traceback that are kept


def described(error: BaseException, number: int, *, fatal: bool) -> tuple[Any, ...]:
    """The values of `Broken` for an ``error``."""
    lines = traceback.format_exception(error)
    texts = (printable(text) for text in (lines[-1].strip()[-TEXT:], "".join(lines)[-TEXT:]))
    return (number, *texts, fatal, _named(error))


def _named(error: BaseException) -> tuple[str, list[Any]] | None:
    """The class and the arguments it was made with, where they are plain and the class is known."""
    kind = type(error)
    try:
        arguments = list(error.__reduce__()[1])
    except Exception:  # an exception of the environment's own, with a mind of its own
        return None
    plain = all(type(argument) in (str, int, float, type(None)) for argument in arguments)
    return (kind.__name__, arguments) if plain and _known(kind.__name__) is kind else None


def _known(name: str) -> type[Exception] | None:
    kind = OURS.get(name) or getattr(builtins, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, Exception) else None


def reraise(broken: Broken) -> None:
    """Raise what a worker could not do: a known exception as itself, another as `EnvPoolError`."""
    error: Exception | None = None
    if broken.error is not None and (kind := _known(broken.error[0])) is not None:
        try:
            error = kind(*broken.error[1])
        except TypeError:  # not the arguments of this class
            error = None
    context = EnvPoolError(f"In an environment worker:\n{broken.traceback}")
    raise error or EnvPoolError(broken.summary) from context
