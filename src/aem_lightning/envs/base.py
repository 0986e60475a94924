"""An environment is an object that talks: Gymnasium's ``reset`` and ``step``, over text."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

Reset = tuple[str, dict[str, Any]]
"""Observation and ``info``."""
Step = tuple[str, float, bool, bool, dict[str, Any]]
"""Observation, reward, terminated, truncated and ``info``."""

RESERVED_INFO_KEYS = (
    "task_id",
    "goal",
    "admissible_actions",
    "is_action_valid",
    "score",
    "won",
    "infra_error",
)


@runtime_checkable
class TextEnv(Protocol):
    """One episode at a time of a task that is played in words.

    ``info`` may hold the reserved keys; their meaning is the same in every environment:

    ====================== ============ =========================================================
    key                    type         meaning
    ====================== ============ =========================================================
    ``task_id``            str          the start state in play
    ``goal``               str          what the task asks for
    ``admissible_actions`` tuple of str what the next ``step`` would accept, where that is known
    ``is_action_valid``    bool         the last action was accepted
    ``score``              float        a graded result
    ``won``                bool         the environment's own word of success
    ``infra_error``        str          what broke outside the policy's doing
    ====================== ============ =========================================================

    The trainer checks all of this where it enters (see ``answers``); scalars may be numpy's. Other
    keys reach it where JSON can say them.

    An environment may also have ``counters()``, numbers by name that all environments of a process
    count together, each since it was last asked for: `EnvPool.counters` sums them. The trainer logs
    the hit rate of ``cache_hits`` and ``cache_misses``.

    The same task and seed give the same episode for the same actions; `check_env` proves it.
    """

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> Reset:
        """Start the task ``options["task_id"]``: its first observation and ``info``."""
        ...

    def step(self, action: str, /) -> Step:
        """The answer to ``action``: observation, reward, terminated, truncated, ``info``."""
        ...

    def close(self) -> None:
        """Free what the environment holds; a second call does nothing."""
        ...


class MissingExtraError(ImportError):
    """An optional package is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"{package} is not installed; it comes with the extra '{extra}': "
            f"pip install 'aem-lightning[{extra}]'"
        )
        self.package = package
        self.extra = extra

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str]]:
        return type(self), (self.package, self.extra)


def import_extra(module: str, extra: str) -> Any:
    """The optional ``module``, which ``extra`` brings.

    Raises:
        MissingExtraError: It is not installed.
    """
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except ImportError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise MissingExtraError(package, extra) from error


class EnvContractError(Exception):
    """An environment breaks the contract of `TextEnv`; the message lists every breach."""


class EnvPoolError(RuntimeError):
    """A pool of environments cannot do what it was asked, or its workers cannot be started."""
