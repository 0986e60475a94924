"""A worker: an interpreter that hosts many env slots and does what its pool orders.

Started as ``python -m aem_lightning.envs.worker FD [GB]``, where FD is its end of a socket pair and
GB bounds its memory. The first message is the environment factory; every later one is a list of
`Order`, each answered by its outcome as soon as it is known (and a `Beat` a second while that takes
longer), or a `Census`. One thread plays all slots, one after the other: engines need not be thread
safe. When its pool closes the socket or dies, the worker closes its environments and ends. Of the
packages that the trainer needs it loads none: a DataModule in the environment's file finds
`AgentDataModule` without Lightning here.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from aem_lightning.envs.answers import RESET, STEP, BadAnswerError, checked_answer
from aem_lightning.envs.base import TextEnv
from aem_lightning.envs.errors import described
from aem_lightning.envs.orders import (
    CLOSE_S,
    Beat,
    Broken,
    Census,
    Counted,
    Order,
    Ready,
    Refused,
    Starting,
    write_answer,
    write_played,
)
from aem_lightning.types import EnvStep, ResetRequest

BEAT_S = 1.0
TOLD_S = 0.25  # what is known for so long is told; more often costs the time of both ends
STIRS_S = 0.005  # processor time between two beats of which more is work, and less our own thread


class _CannotMakeError(Exception):
    """The environment factory raised; the cause is what it raised."""


@dataclass(slots=True)
class _Slot:
    """An environment, the episode that it plays and the turn that comes next."""

    env: TextEnv
    request: ResetRequest
    turn: int = 0

    def reset(self, request: ResetRequest) -> EnvStep:
        self.request, self.turn = request, 0
        result = self.env.reset(seed=request.seed, options={"task_id": request.task_id})
        return self._checked("reset", result, RESET)

    def step(self, action: str) -> EnvStep:
        step = self._checked("step", self.env.step(action), STEP, action)
        self.turn += 1
        return step

    def _checked(
        self, method: str, result: Any, names: tuple[str, ...], action: str | None = None
    ) -> EnvStep:
        task, uses_reward = self.request.task_id, self.request.uses_reward
        try:
            return checked_answer(result, names, task_id=task, uses_reward=uses_reward)
        except BadAnswerError as error:
            where = "" if action is None else f", turn {self.turn}"
            call = method if action is None else f"{method}({action[:100]!r})"
            raise BadAnswerError(f"task {task!r}{where}: {call} returned {error}") from None


class EnvSlots:
    """Numbered environments, made when first needed and used again for every later episode.

    Attributes:
        calls: Calls of environments that have returned.
    """

    def __init__(self, make_env: Callable[[], TextEnv]) -> None:
        self._make_env = make_env
        self._slots: dict[int, _Slot] = {}
        self._spare: list[TextEnv] = [make_env()]
        self.calls = 0

    def run(self, number: int, order: Order, beat: Callable[[int], None]) -> bytes:
        """The line that answers ``order``; a slot whose environment broke gets a new one next time.

        Where memory runs out the process ends: a new one may have enough.
        """
        try:
            steps = list(self._play(order, beat))[-2:]
            return write_played(number, steps, self._slots[order.slot].request.task_id)
        except MemoryError:
            print(f"MemoryError: {_out_of_memory()}", file=sys.stderr, flush=True)
            os._exit(1)  # whatever threads the environment has
        except BadAnswerError as error:
            self._drop(order.slot)
            return write_answer(Refused, number, str(error))
        except Exception as error:
            self._drop(order.slot)
            cause = error.__cause__ if isinstance(error, _CannotMakeError) else None
            fatal = isinstance(error, _CannotMakeError | ImportError)
            return write_answer(Broken, *described(cause or error, number, fatal=fatal))

    def counters(self) -> dict[str, float]:
        """What the environments count together; nothing where they do not."""
        some = next(iter((*(slot.env for slot in self._slots.values()), *self._spare)), None)
        return dict(getattr(some, "counters", dict)())

    def close(self) -> None:
        """Free what the environments hold; one that cannot is no reason to leave the others."""
        for env in (*self._spare, *(slot.env for slot in self._slots.values())):
            _close(env)

    def _drop(self, number: int) -> None:
        if (slot := self._slots.pop(number, None)) is not None:
            _close(slot.env)

    def _play(self, order: Order, beat: Callable[[int], None]) -> Iterator[EnvStep]:
        if order.request is not None:
            yield self._slot(order.slot, order.request).reset(order.request)
            self._count(beat)
        for action in order.actions:
            yield self._slots[order.slot].step(action)
            self._count(beat)

    def _count(self, beat: Callable[[int], None]) -> None:
        self.calls += 1
        beat(self.calls)

    def _slot(self, number: int, request: ResetRequest) -> _Slot:
        if number not in self._slots:
            try:
                env = self._spare.pop() if self._spare else self._make_env()
            except Exception as error:
                raise _CannotMakeError from error
            self._slots[number] = _Slot(env, request)
        return self._slots[number]


def _close(env: TextEnv) -> None:
    try:
        env.close()
    except Exception:  # it is no longer needed
        traceback.print_exc()


def serve(connection: socket.socket) -> None:
    """Answer orders until the pool closes the socket; then close the environments."""
    stream = connection.makefile("rb")
    try:
        with _starting(connection):
            slots = EnvSlots(pickle.load(stream))
    except EOFError:
        return
    except Exception as error:
        told_error = MemoryError(_out_of_memory()) if isinstance(error, MemoryError) else error
        connection.sendall(write_answer(Broken, *described(told_error, 0, fatal=True)))
        return
    with contextlib.closing(slots):
        _answer(connection, stream, slots)


def _answer(connection: socket.socket, stream: BinaryIO, slots: EnvSlots) -> None:
    connection.sendall(write_answer(Ready))
    told, number = time.monotonic(), 0

    def beat(calls: int) -> None:
        nonlocal told
        if time.monotonic() - told > BEAT_S:
            connection.sendall(write_answer(Beat, calls))
            told = time.monotonic()

    while True:
        try:
            orders: list[Order] | Census = pickle.load(stream)
        except (EOFError, OSError, pickle.UnpicklingError):
            return
        if isinstance(orders, Census):
            connection.sendall(_counted(slots))
            continue
        lines: list[bytes] = []
        told = time.monotonic()
        for order in orders:
            number += 1
            lines.append(slots.run(number, order, beat))
            # A replay is told at once: where the next one hangs it is known which.
            if order.request is not None or time.monotonic() - told > TOLD_S:
                connection.sendall(b"".join(lines))
                told = time.monotonic()
                lines.clear()
        connection.sendall(b"".join(lines))


def _counted(slots: EnvSlots) -> bytes:
    try:
        return write_answer(Counted, slots.counters())
    except Exception:  # counting is no part of playing
        traceback.print_exc()
        return write_answer(Counted, {})


def _out_of_memory() -> str:
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    limit = f"; its limit is datamodule.memory_gb={soft / 1e9:g}"
    unlimited = soft == resource.RLIM_INFINITY
    return f"an environment worker has no memory left{'' if unlimited else limit}"


@contextlib.contextmanager
def _starting(connection: socket.socket) -> Iterator[None]:
    """Send `Starting` once a second where this process gets on with what the block does.

    One that hangs uses no processor time; one that a busy machine leaves waiting uses a little.
    """
    done = threading.Event()

    def tell() -> None:
        told, waiting = 0.0, True
        while waiting:
            used = time.process_time()
            if used - told > STIRS_S:
                connection.sendall(write_answer(Starting, used))
                told = used
            waiting = not done.wait(BEAT_S)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _end_with(parent: int) -> None:
    """Poll for the pool's process, so that a slot that hangs does not outlive it."""
    while os.getppid() == parent:
        time.sleep(BEAT_S)
    time.sleep(CLOSE_S)  # an idle one closes its environments meanwhile, and ends by itself
    os._exit(0)


def main(fd: int, memory_gb: float | None = None) -> None:
    """Serve the socket ``fd``, with ``memory_gb`` at most."""
    if memory_gb is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (int(memory_gb * 1e9), hard))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the pool, which hangs up
    sys.stdout = sys.stderr  # what an engine prints belongs to the log
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    os.set_inheritable(fd, False)  # what the environment starts is not to hold the line open
    with contextlib.suppress(OSError):  # the pool is gone: nobody waits for the answer
        serve(socket.socket(fileno=fd))


if __name__ == "__main__":
    main(int(sys.argv[1]), *map(float, sys.argv[2:]))
