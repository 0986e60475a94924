"""A small deterministic environment that can be told to crash, hang or raise; workers import it."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from aem_lightning.envs import EnvPool, ResetRequest


class ToyEnv:
    """Every observation is a digest of the task, the seed and all actions before.

    Args:
        marks: A folder; "... once" actions do their harm only as long as no file there says so.
        closed: A folder in which a file says which environment was closed.
    """

    made = 0
    counted = 0

    def __init__(self, marks: str | Path = "/nonexistent", closed: Path | None = None) -> None:
        type(self).made += 1
        self.number = type(self).made
        self.marks = Path(marks)
        self.closed = closed
        self.steps_taken = 0

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        self.task_id = (options or {})["task_id"]
        self.trace = [self.task_id, str(seed)]
        if "harm" in self.task_id:
            self._harm(self.task_id)
        return self._observation(), self._info(valid=True)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.steps_taken += 1
        type(self).counted += 1
        if "harm" in action:
            self._harm(action)
        valid = action in self._admissible() or "harm" in action
        self.trace.append(action)
        won = action == "win"
        return self._observation(), float(won), won, False, self._info(valid=valid)

    def counters(self) -> dict[str, int]:
        counted, type(self).counted = type(self).counted, 0
        return {"toy_steps": counted}

    def close(self) -> None:
        if self.closed is not None:
            (self.closed / f"{self.number} by {os.getpid()}").touch()

    def _harm(self, text: str) -> None:
        if "once" in text:
            mark = self.marks / hashlib.sha256(text.encode()).hexdigest()
            if mark.exists():
                return
            mark.touch()
        if "die" in text:
            print("the toy dies", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if "hang" in text:
            time.sleep(600)
        if "raise" in text:
            raise ZeroDivisionError("the toy raises")
        if "miss" in text:
            import no_such_package  # noqa: F401

    def _observation(self) -> str:
        return hashlib.sha256("|".join(self.trace).encode()).hexdigest()

    def _admissible(self) -> tuple[str, ...]:
        rng = random.Random(self._observation())
        return ("look", "win", f"say {rng.randrange(100)}")

    def _info(self, *, valid: bool) -> dict[str, Any]:
        return {
            "task_id": self.task_id,
            "admissible_actions": self._admissible(),
            "is_action_valid": valid,
            "env_number": self.number,
            "pid": os.getpid(),
        }


def fail_to_make() -> ToyEnv:
    raise LookupError("the toy box is empty")


def start_late(seconds: float, share: float) -> ToyEnv:
    """Computes for a ``share`` of the ``seconds`` before it makes one, and waits for the rest."""
    end = time.monotonic() + seconds
    while (now := time.monotonic()) < end:
        if share < 1:
            time.sleep(0.2 * (1 - share) if share else seconds)
        while time.monotonic() < now + 0.2 and share:
            pass
    return ToyEnv()


class MissesPackage:
    """An environment whose constructor needs a package that is not there."""

    def __init__(self) -> None:
        import no_such_package  # noqa: F401


class Loaded:
    """Says what its process has imported, the module of the environment that it makes included."""

    def __init__(self, make_env: Callable[[], Any]) -> None:
        make_env()

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        return " ".join(sorted(sys.modules)), {}


def loaded_by(make_env: Callable[[], Any]) -> set[str]:
    """What a worker has imported once it has made an environment."""
    with EnvPool(partial(Loaded, make_env), workers=1) as pool:
        return set(pool.reset({"a": ResetRequest("any")})["a"].observation.split())
