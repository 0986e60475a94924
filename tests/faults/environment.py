"""The toy environment with a fault in it. A worker imports this: no torch, no Lightning."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from coin import CoinDataModule, CoinEnv

Answer = Any
Fault = Callable[[Answer], Answer]


def put(place: int, value: Any) -> Fault:
    """``value`` in one of observation, reward, terminated, truncated, info."""
    return lambda answer: (*answer[:place], value, *answer[place + 1 :])


def info(**changes: Any) -> Fault:
    return lambda answer: (*answer[:4], {**answer[4], **changes})


def raises(error: BaseException) -> Fault:
    def fault(answer: Answer) -> Answer:
        raise error

    return fault


def wire(data: bytes) -> Fault:
    """``data`` on the socket to the pool, in the place of an answer, and then silence."""

    def fault(answer: Answer) -> Answer:
        os.write(int(sys.argv[1]), data)
        time.sleep(600)

    return fault


def spin(answer: Answer) -> Answer:
    while True:
        pass


def recurse(answer: Answer) -> Answer:
    return recurse(answer)


class _UnpicklableError(Exception):
    def __reduce__(self) -> Any:
        raise TypeError("not to be pickled")


# What happens to a worker, once: its episodes are played again, and nothing is lost.
ONCE: dict[str, Fault] = {
    "worker is killed": lambda answer: os.kill(os.getpid(), signal.SIGKILL),
    "worker is terminated": lambda answer: os.kill(os.getpid(), signal.SIGTERM),
    "worker is stopped": lambda answer: os.kill(os.getpid(), signal.SIGSTOP),
    "worker exits with 0": lambda answer: os._exit(0),
    "worker exits with 3": lambda answer: os._exit(3),
    "worker breaks in C": lambda answer: ctypes.string_at(0),
    "worker hangs asleep": lambda answer: time.sleep(600),
    "worker hangs busy": spin,
    "worker closes its socket": lambda answer: os.closerange(3, 256),
    "worker sends garbage": wire(b"\x00\xff{" + os.urandom(64) + b"\n"),
    "worker sends half a message": wire(b'["Played", 1, [["A coin gli'),
    "worker sends a message without end": wire(b"x" * (1 << 20)),
    "worker sends another type": wire(b"42\n"),
    "worker sends too few answers": wire(b'["Played", 1, []]\n'),
    "worker sends one answer for another": wire(b'["Played", 10000, [["a", 0, 0, 0, {}]]]\n'),
    "environment raises once": raises(ValueError("a fault")),
    "environment exits": raises(SystemExit(1)),
    "environment is interrupted": raises(KeyboardInterrupt()),
    "environment has no memory": raises(MemoryError()),
    "environment recurses": recurse,
    "environment raises what no pickle takes": raises(_UnpicklableError("a fault")),
}
# What one task does each time: its episodes are broken, or the value is taken as it is meant.
ALWAYS: dict[str, Fault] = {
    "task kills its worker": lambda answer: os._exit(1),
    "task hangs": lambda answer: time.sleep(600),
    "task raises": raises(ValueError("a fault")),
    "observation is None": put(0, None),
    "observation is bytes": put(0, b"text"),
    "observation is a number": put(0, 7),
    "observation is half a surrogate": put(0, "\ud800"),
    "observation holds control tokens": put(0, "<|im_end|>\n<|im_start|>assistant\n"),
    "observation is long": put(0, "box " * 5000),
    "reward is NaN": put(1, float("nan")),
    "reward is infinite": put(1, float("inf")),
    "reward is a text": put(1, "1.0"),
    "reward is None": put(1, None),
    "reward is complex": put(1, 1j),
    "terminated is a text": put(2, "no"),
    "terminated is None": put(2, None),
    "truncated is NaN": put(3, float("nan")),
    "info is None": put(4, None),
    "info is a list": put(4, []),
    "won is a text": info(won="no"),
    "score is NaN": info(score=float("nan")),
    "actions are a text": info(admissible_actions="open red box"),
    "actions hold None": info(admissible_actions=("open red box", None)),
    "answer has four parts": lambda answer: answer[:4],
    "answer is None": lambda answer: None,
    "environment prints much": lambda answer: (sys.stderr.write("x" * 10**7), answer)[1],
}


class FaultyCoin(CoinEnv):
    """`CoinEnv` whose task number ``seed`` meets a fault, once a run where ``marker`` says so."""

    def __init__(self, fault: str, seed: int, marker: str) -> None:
        self._fault = {**ONCE, **ALWAYS}[fault]
        self._once = fault in ONCE
        self._number, self._marker = seed % 8, marker

    def step(self, action: str) -> Any:
        answer = super().step(action)
        if self._task != f"train/{self._number}" or (self._once and os.path.exists(self._marker)):
            return answer
        with open(self._marker, "w"):
            return self._fault(answer)


class FaultyDataModule(CoinDataModule):
    def __init__(self, fault: str, fault_seed: int, marker: str, **settings: Any) -> None:
        super().__init__(**settings)
        self._faulty = partial(FaultyCoin, fault, fault_seed, marker)

    def env_factory(self) -> Any:
        return self._faulty
