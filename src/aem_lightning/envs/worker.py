"""A worker: an interpreter that hosts many env slots and does what its pool orders.

Started as ``python -m aem_lightning.envs.worker FD``, where FD is its end of a socket pair. The
first message is the pickled environment factory; every later one is a list of `Order`, answered by
one list of outcomes (and a `Beat` a second while that takes longer), or a `Census`. One thread
plays all slots, one after the other: engines need not be thread safe. The worker ends when its pool
closes the socket or dies. Of the packages that the trainer needs it loads none: a DataModule in the
environment's file finds `AgentDataModule` without Lightning here.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from aem_lightning.envs.base import TextEnv
from aem_lightning.envs.orders import Beat, Broken, Census, Order, Outcome, Starting
from aem_lightning.types import EnvStep

BEAT_S = 1.0
STIRS_S = 0.005  # processor time between two beats of which more is work, and less our own thread


class _CannotMakeError(Exception):
    """The environment factory raised; the cause is what it raised."""


class EnvSlots:
    """Numbered environments, made when first needed and used again for every later episode."""

    def __init__(self, make_env: Callable[[], TextEnv]) -> None:
        self._make_env = make_env
        self._envs: dict[int, TextEnv] = {}
        self._spare: list[TextEnv] = [make_env()]

    def run(self, order: Order, beat: Callable[[], None]) -> Outcome:
        """Do ``order``. A slot whose environment raised gets a new one next time."""
        try:
            return list(self._play(order, beat))
        except Exception as error:
            self._envs.pop(order.slot, None)
            return describe(error)

    def counters(self) -> dict[str, int]:
        """What the environments count together; nothing where they do not."""
        some = next(iter((*self._envs.values(), *self._spare)), None)
        return dict(getattr(some, "counters", dict)())

    def _play(self, order: Order, beat: Callable[[], None]) -> Iterable[EnvStep]:
        env = self._env(order.slot)
        if order.request is not None:
            options = {"task_id": order.request.task_id}
            observation, info = env.reset(seed=order.request.seed, options=options)
            yield EnvStep(observation, info=info)
            beat()
        for action in order.actions:
            yield EnvStep(*env.step(action))
            beat()

    def _env(self, slot: int) -> TextEnv:
        if slot not in self._envs:
            try:
                self._envs[slot] = self._spare.pop() if self._spare else self._make_env()
            except Exception as error:
                raise _CannotMakeError from error
        return self._envs[slot]


def describe(error: Exception, *, fatal: bool = False) -> Broken:
    """The outcome of an order that raised ``error``."""
    cause = error.__cause__ if isinstance(error, _CannotMakeError) else error
    lines = traceback.format_exception(cause)
    return Broken(
        summary=lines[-1].strip(),
        traceback="".join(lines),
        fatal=fatal or isinstance(error, _CannotMakeError | ImportError),
        error=_pickled(cause),
    )


def _pickled(error: Any) -> bytes | None:
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:  # user-made exceptions may not survive the way: their text does
        return None
    return data


def serve(connection: Connection[Any, Any]) -> None:
    """Answer orders until the pool closes the socket."""
    try:
        with _starting(connection):
            slots = EnvSlots(pickle.loads(connection.recv_bytes()))
    except EOFError:
        return
    except Exception as error:
        connection.send(describe(error, fatal=True))
        return
    connection.send(Beat())
    told = time.monotonic()

    def beat() -> None:
        nonlocal told
        if time.monotonic() - told > BEAT_S:
            connection.send(Beat())
            told = time.monotonic()

    while True:
        try:
            orders: list[Order] | Census = connection.recv()
        except (EOFError, OSError):
            return
        told = time.monotonic()
        if isinstance(orders, Census):
            connection.send(slots.counters())
            continue
        connection.send([slots.run(order, beat) for order in orders])


@contextlib.contextmanager
def _starting(connection: Connection[Any, Any]) -> Iterator[None]:
    """Send `Starting` once a second where this process gets on with what the block does.

    One that hangs uses no processor time; one that a busy machine leaves waiting uses a little.
    """
    done = threading.Event()

    def tell() -> None:
        told, waiting = 0.0, True
        while waiting:
            used = time.process_time()
            if used - told > STIRS_S:
                connection.send(Starting(used))
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
    os._exit(0)


def main(fd: int) -> None:
    """Serve the socket ``fd``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the pool, which hangs up
    sys.stdout = sys.stderr  # what an engine prints belongs to the log
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    with contextlib.suppress(OSError):  # the pool is gone: nobody waits for the answer
        serve(Connection(fd))


if __name__ == "__main__":
    main(int(sys.argv[1]))
