"""A worker process, seen from its pool: started, spoken to, killed."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection
from typing import Any

from aem_lightning.envs.base import EnvPoolError
from aem_lightning.envs.orders import Beat, Broken, Census, Order, Outcome, Starting

WORKER = "aem_lightning.envs.worker"
LEAST_START_S = 30.0  # an interpreter's own on a busy machine, however little an answer may take
STDERR_TAIL = 2_000
STDERR_LIMIT = 1 << 20


class WorkerLostError(Exception):
    """A worker died, or did not answer in time."""


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
    """

    def __init__(self, factory: bytes) -> None:
        ours, theirs = socket.socketpair()
        self._stderr = tempfile.TemporaryFile("a+b", prefix="aem-worker-")  # noqa: SIM115 (lives on)
        with theirs:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", WORKER, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._stderr,
                stderr=self._stderr,
                env=_environment(),
                process_group=0,  # what a terminal signals is for its pool, which ends it
            )
        self._connection: Connection[Any, Any] = Connection(ours.detach())
        with contextlib.suppress(OSError):  # a worker that is dead already is found by wait_ready
            self._connection.send_bytes(factory)

    @property
    def pid(self) -> int:
        return self._popen.pid

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until the first environment is made.

        Raises:
            EnvPoolError: The interpreter ended, did nothing for ``timeout_s``, or computed for so
                long: a busy machine may take its time.
            Exception: What making the environment raised.
        """
        limit = max(timeout_s, LEAST_START_S)
        try:
            while isinstance(message := self._receive(limit), Starting):
                if message.computed_s > limit:
                    raise WorkerLostError(f"not done after computing for {message.computed_s:g} s")
        except WorkerLostError as lost:
            alive = self._popen.poll() is None
            self.kill()
            hint = f". To wait longer, type datamodule.timeout_s={2 * limit:g}" if alive else ""
            raise EnvPoolError(
                f"An environment worker could not be started: {lost}{hint}"
            ) from None
        if isinstance(message, Broken):
            self.kill()
            reraise(message)

    def send(self, message: list[Order] | Census) -> None:
        """Hand orders over, or ask for the counters.

        Raises:
            WorkerLostError: The worker is dead.
        """
        try:
            self._connection.send(message)
        except OSError:
            raise WorkerLostError(self._obituary()) from None

    def outcomes(self, timeout_s: float) -> list[Outcome]:
        """The answer to the orders sent last.

        Raises:
            WorkerLostError: The worker died, or gave no sign of life for ``timeout_s``.
        """
        while isinstance(message := self._receive(timeout_s), Beat):
            pass
        return message  # type: ignore[no-any-return]

    def counters(self, timeout_s: float) -> dict[str, int]:
        """What the worker's environments have counted since they were last asked.

        Raises:
            WorkerLostError: The worker died, or did not answer within ``timeout_s``.
        """
        self.send(Census())
        return self._receive(timeout_s)  # type: ignore[no-any-return]

    def _receive(self, timeout_s: float) -> Any:
        try:
            if not self._connection.poll(timeout_s):
                raise WorkerLostError(f"no answer within {timeout_s:g} s{self._said()}")
            return self._connection.recv()
        except (EOFError, OSError):
            raise WorkerLostError(self._obituary()) from None

    def _obituary(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(1.0)
        return f"worker {self.pid} ended with exit status {self._popen.returncode}{self._said()}"

    def _said(self) -> str:
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
        self._connection.close()

    def kill(self, grace_s: float = 0.0) -> None:
        """End the process, after ``grace_s`` for certain; a second call does nothing."""
        self.hang_up()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(grace_s)
        self._popen.kill()
        self._popen.wait()
        self._stderr.close()


def reraise(broken: Broken) -> None:
    """Raise what a worker could not do, with its own exception where that came across."""
    context = EnvPoolError(f"In an environment worker:\n{broken.traceback}")
    if broken.error is None:
        raise EnvPoolError(broken.summary) from context
    raise pickle.loads(broken.error) from context


def _environment() -> dict[str, str]:
    """The worker's environment: our import path, one thread, the same hash seed everywhere."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
