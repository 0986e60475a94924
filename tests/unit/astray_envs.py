"""Environments whose workers go astray on the wire, in memory or in what they return."""

from __future__ import annotations

import os
import signal
import sys
import time
from fractions import Fraction
from typing import Any

from toy_text_env import ToyEnv

LEAKED: list[bytes] = []
SENTENCE = "a word " * 1_000_000


def wire() -> int:
    """The descriptor of this worker's end of the socket."""
    return int(sys.argv[1])


class Astray(ToyEnv):
    """Does what its action, or its task, names."""

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        what, _, rest = action.partition(" ")
        if what == "garbage":
            os.write(wire(), b"\x80\x04\x95garbage\n")
        elif what == "half":
            os.write(wire(), b'["Played",1,[["half of')
            time.sleep(600)
        elif what == "twice":
            os.write(wire(), b'["Played",3,[["twice",0.0,false,false,{}]]]\n' * 2)
        elif what == "other":
            os.write(wire(), b'["Played",3,{"a":"mapping"}]\n')
        elif what == "beats":
            os.write(wire(), b'["Beat",1]\n' * 5)
        elif what == "endless":
            while True:
                os.write(wire(), b" " * 65536)
        elif what == "stop":
            if os.fork() == 0:  # stops its parent while that writes
                time.sleep(0.3)
                os.kill(os.getppid(), signal.SIGSTOP)
                os._exit(0)
            time.sleep(0.5 if rest else 0)
        elif what == "leak":
            LEAKED.append(bytes(range(256)) * 40_000)
        elif what == "variable":
            return os.environ.get(rest, "none"), 0.0, False, False, {}
        elif what == "long":
            return SENTENCE, 0.0, False, False, {}
        return super().step(action)


class Numpyish:
    """A scalar such as numpy's, which is not among the packages that a worker needs."""

    shape = ()

    def __init__(self, value: Any) -> None:
        self.value = value

    def item(self) -> Any:
        return self.value


ANSWERS: dict[str, dict[str, Any]] = {
    "observation": {"observation": b"bytes"},
    "half a surrogate": {"observation": "a box \ud83d and more"},
    "reward": {"reward": "1.0"},
    "NaN": {"reward": float("nan")},
    "infinity": {"reward": float("-inf")},
    "too large": {"reward": 10**400},
    "none": {"reward": None},
    "terminated": {"terminated": 1},
    "truncated": {"truncated": None},
    "no info": {"info": None},
    "won": {"info": {"won": "no"}},
    "score": {"info": {"score": float("nan")}},
    "valid": {"info": {"is_action_valid": 0.0}},
    "goal": {"info": {"goal": ["a", "goal"]}},
    "another task": {"info": {"task_id": "another"}},
    "one action": {"info": {"admissible_actions": "look"}},
    "an action": {"info": {"admissible_actions": ("look", 7)}},
    "surrogate action": {"info": {"admissible_actions": ("look", "\udc00")}},
    "reason": {"info": {"infra_error": ValueError("no")}},
    "numpy": {
        "reward": Numpyish(0.5),
        "terminated": Numpyish(True),
        "info": {"won": Numpyish(True)},
    },
    "fraction": {"reward": Fraction(1, 2), "terminated": True, "info": {"score": 3}},
    "objects": {"info": {"set": {1, 2}, "deep": [{"a": (1, 2)}], 7: "number", ("a", "b"): 1}},
}


class Answers(ToyEnv):
    """Returns the answer that its action names in place of its own."""

    def step(self, action: str) -> Any:
        given = ANSWERS.get(action)
        if action == "short":
            return super().step(action)[:4]
        if given is None:
            return super().step(action)
        plain = {
            "observation": "all is well",
            "reward": 0.0,
            "terminated": False,
            "truncated": False,
        }
        return tuple((plain | {"info": {}} | given).values())


class OwnError(Exception):
    """An exception that no trainer would want to be made anew: it acts when it is."""

    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/astray_envs_was_unpickled",)


class Raises(ToyEnv):
    """Cannot be made; how is decided by ``error``."""

    error: Exception = OwnError("its own")

    def __init__(self) -> None:
        raise self.error


class RaisesOurs(Raises):
    error = FileNotFoundError(2, "No such file", "/data/games")
