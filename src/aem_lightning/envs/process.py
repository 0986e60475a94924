"""A worker process, seen from its pool: started, spoken to, listened to, killed."""

from __future__ import annotations

import contextlib
import os
import pickle
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TypeVar

from aem_lightning.envs.base import EnvPoolError
from aem_lightning.envs.errors import reraise
from aem_lightning.envs.orders import (
    OUTCOME_BYTES,
    Answer,
    Beat,
    Broken,
    Census,
    Counted,
    Order,
    Outcome,
    Ready,
    Starting,
    read_answer,
)
from aem_lightning.types import TROUBLESHOOTING

K = TypeVar("K", bound=Hashable)

WORKER = "aem_lightning.envs.worker"
LEAST_START_S = 30.0  # an interpreter's own on a busy machine, however little an answer may take
FACTORY_S = 300.0  # to take the factory in, which may hold a whole data set
STDERR_TAIL = 2_000
STDERR_LIMIT = 1 << 20
CHUNK = 1 << 18
LOOK_S = 1.0  # between two looks at whether workers still live
STARTS, COUNTS = 0, -1  # what is out, beside the numbers of orders


class WorkerLostError(Exception):
    """A worker died, or answered what is no answer."""


class WorkerHungError(WorkerLostError):
    """A worker did not answer in time."""


def in_worker() -> bool:
    """Whether this process is an environment worker."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec is not None and spec.name == WORKER


class WorkerProcess:
    """A fresh interpreter that runs `aem_lightning.envs.worker`.

    It is started by ``Popen`` and not by ``multiprocessing``: neither the trainer's memory nor its
    imports (torch) come along.

    Args:
        factory: The pickled environment factory.
        environment: Its environment variables.
        memory_gb: What it may allocate, in GB (10^9 bytes); ``None`` for all there is.
    """

    def __init__(
        self, factory: bytes, environment: Mapping[str, str], memory_gb: float | None = None
    ) -> None:
        ours, theirs = socket.socketpair()
        self._stderr = tempfile.TemporaryFile("a+b", prefix="aem-worker-")  # noqa: SIM115 (lives on)
        limit = [] if memory_gb is None else [str(memory_gb)]
        with theirs:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", WORKER, str(theirs.fileno()), *limit],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._stderr,
                stderr=self._stderr,
                env=environment,
                process_group=0,  # what a terminal signals is for its pool, which ends it
            )
        self._socket = ours
        self._parts: list[bytes] = []  # of a line that has begun
        self._out = deque([STARTS])  # answers that are out: numbers of orders, and the two below
        self._orders = self._calls = self._promised = 0  # given; calls reported, and asked for
        with contextlib.suppress(
            WorkerLostError
        ):  # one that is dead already is found by wait_ready
            self._write(factory, FACTORY_S)

    def has_ended(self) -> bool:
        """Whether the process is gone."""
        return self._popen.poll() is not None

    @property
    def owes(self) -> bool:
        """Whether an answer is out."""
        return bool(self._out)

    @property
    def pid(self) -> int:
        return self._popen.pid

    def fileno(self) -> int:
        """What a selector waits for."""
        return self._socket.fileno()

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until the first environment is made.

        Raises:
            EnvPoolError: The interpreter ended, did nothing for ``timeout_s``, or computed for so
                long: a busy machine may take its time.
            Exception: What making the environment raised.
        """
        limit = max(timeout_s, LEAST_START_S)
        for _, answer in listen({0: self}, limit):
            lost = answer if isinstance(answer, WorkerLostError) else None
            if isinstance(answer, Starting) and answer.computed_s > limit:
                lost = WorkerHungError(f"not done after computing for {answer.computed_s:g} s")
            if lost is not None:
                alive = self._popen.poll() is None
                self.kill()
                hint = f". To wait longer, type datamodule.timeout_s={2 * limit:g}" if alive else ""
                told = f"An environment worker could not be started: {lost}{hint}"
                raise EnvPoolError(f"{told} (see {TROUBLESHOOTING}#it-hangs)")
            if isinstance(answer, Broken):
                self.kill()
                reraise(answer)

    def send(self, message: Sequence[Order] | Census, timeout_s: float) -> None:
        """Hand orders over, or ask for the counters.

        Raises:
            WorkerLostError: The worker is dead, or takes nothing for ``timeout_s``.
        """
        self._write(pickle.dumps(message), timeout_s)
        if isinstance(message, Census):
            self._out.append(COUNTS)
            return
        self._out.extend(range(self._orders + 1, self._orders + len(message) + 1))
        self._orders += len(message)
        self._promised += sum(len(o.actions) + (o.request is not None) for o in message)

    def _write(self, data: bytes, timeout_s: float) -> None:
        try:
            self._socket.settimeout(timeout_s)
            self._socket.sendall(data)
            self._socket.setblocking(False)
        except TimeoutError:
            raise WorkerHungError(f"it read nothing for {timeout_s:g} s{self.said()}") from None
        except OSError:
            raise WorkerLostError(self.obituary()) from None

    def read(self) -> Iterator[Answer]:
        """What has come of the answers that are out, without waiting.

        Raises:
            WorkerLostError: The worker is dead, or said what is no answer.
        """
        while self._out:
            try:
                chunk = self._socket.recv(CHUNK)
            except BlockingIOError:
                return
            except OSError:
                chunk = b""
            if not chunk:
                raise WorkerLostError(self.obituary())
            self._parts.append(chunk)
            if b"\n" in chunk:
                *lines, rest = b"".join(self._parts).split(b"\n")
                self._parts = [rest]
                yield from map(self._understood, lines)
            elif sum(map(len, self._parts)) > OUTCOME_BYTES:
                raise WorkerLostError(f"an answer of over {OUTCOME_BYTES:,} bytes{self.said()}")

    def _understood(self, line: bytes) -> Answer:
        """The answer on a ``line``: one that was asked for, or a sign of life that says more."""
        try:
            answer = read_answer(line)
            if isinstance(answer, Beat):
                fits = self._calls < answer.calls <= self._promised
                self._calls = answer.calls
            elif isinstance(answer, Starting):
                fits = self._out[0] == STARTS
            else:
                fits = self._out.popleft() == _answered(answer)
        except (ValueError, IndexError):
            fits = False
        if not fits:
            raise WorkerLostError(f"it said what is no answer: {line[:200]!r}{self.said()}")
        return answer

    def obituary(self) -> str:
        """How the worker ended, and its last words."""
        self.wait(1.0)
        return f"worker {self.pid} ended with exit status {self._popen.returncode}{self.said()}"

    def said(self) -> str:
        """The worker's last words, to stand behind a reason; empty where it said nothing."""
        tail = self.stderr_tail()
        return f"; its last words: {tail}" if tail else ""

    def stderr_tail(self) -> str:
        """The last characters that the worker wrote on stdout and stderr."""
        if self._stderr.closed:
            return ""
        size = os.fstat(self._stderr.fileno()).st_size
        start = max(0, size - STDERR_TAIL)
        return os.pread(self._stderr.fileno(), STDERR_TAIL, start).decode(errors="replace").strip()

    def trim_stderr(self) -> None:
        """Keep a talkative engine from filling the disk."""
        if os.fstat(self._stderr.fileno()).st_size > STDERR_LIMIT:
            os.ftruncate(self._stderr.fileno(), 0)

    def hang_up(self) -> None:
        """Close the socket: an idle worker then ends by itself."""
        self._socket.close()

    def wait(self, seconds: float) -> None:
        """Give a process that was hung up on so long to end by itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(seconds)

    def kill(self) -> None:
        """End the process; a second call does nothing."""
        self.hang_up()
        self._popen.kill()
        self._popen.wait()
        self._stderr.close()


def _answered(answer: Outcome | Ready | Counted) -> int:
    """What an answer answers, as the deque of answers that are out has it."""
    if isinstance(answer, Counted):
        return COUNTS
    return STARTS if isinstance(answer, Ready) else answer.number


def listen(
    processes: Mapping[K, WorkerProcess], timeout_s: float
) -> Iterator[tuple[K, Answer | WorkerLostError]]:
    """All that is said until no answer is out, as it comes; a lost worker ends with its reason.

    Every worker has ``timeout_s`` from its last whole word on, all of them at the same time.
    """
    waiting = {key: time.monotonic() + timeout_s for key, p in processes.items() if p.owes}
    with selectors.DefaultSelector() as selector:
        for key in waiting:
            selector.register(processes[key], selectors.EVENT_READ, key)
        while waiting:
            selector.select(min(LOOK_S, max(0.0, min(waiting.values()) - time.monotonic())))
            for key in list(waiting):
                process = processes[key]
                ended = process.has_ended()  # asked first: what it said last is read all the same
                try:
                    for answer in process.read():
                        waiting[key] = time.monotonic() + timeout_s
                        yield key, answer
                    if process.owes and ended:  # a child of it may hold the socket open
                        raise WorkerLostError(process.obituary())
                    if process.owes and time.monotonic() > waiting[key]:
                        raise WorkerHungError(f"no answer within {timeout_s:g} s{process.said()}")
                except WorkerLostError as lost:
                    yield key, lost
                else:
                    if process.owes:
                        continue
                selector.unregister(process)
                del waiting[key]
