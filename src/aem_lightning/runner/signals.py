"""Signals that end a run: it stops where nothing is half done, saves, and says how to go on."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from aem_lightning.runner import ranks

log = logging.getLogger(__name__)

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAME_S = 0.2  # a terminal that closes tells its processes more than once
TIDY_S = 30  # what tidying up may take, where nothing is held


class Stopped(SystemExit):
    """A signal ends the run; the exit status is 128 and the signal's number.

    Attributes:
        signal: The signal.
        told: What is kept, and how to go on.
    """

    def __init__(self, number: int, told: str) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)
        self.told = told


class StopSignals:
    """The handlers of this process.

    The first signal raises `Stopped`, or waits where what is under way must come to its end; the
    second ends the process at once. With several ranks, rank 0 decides: the first of another rank,
    which a terminal and a scheduler tell too, is passed over.

    Attributes:
        held: Whether what is under way must not stop in the middle.
        told: What a stop leaves, and how to go on.
    """

    def __init__(self) -> None:
        self.held = False
        self.told = "stopped. There is nothing to save yet: the same command starts again"
        self._former: dict[int, object] = {}
        self._received: tuple[int, float] | None = None
        self._ticks = 0

    def install(self, *others: int) -> None:
        """Take over the signals, ``others`` too; what was ignored (``nohup``) stays so.

        The alarm that `release` sets needs its handler now: at its end a trainer gives every signal
        the handler that it found at its start, and an alarm without one ends the process.
        """
        self._former.setdefault(signal.SIGALRM, signal.getsignal(signal.SIGALRM))
        signal.signal(signal.SIGALRM, self._tick)
        for number in (*ENDING, *others):
            former = signal.getsignal(number)
            if former is not signal.SIG_IGN:
                self._former.setdefault(number, former)
                signal.signal(number, self._receive)

    def restore(self) -> None:
        """Give the signals back."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, former in self._former.items():
            signal.signal(number, former)  # type: ignore[arg-type]  # what getsignal gave

    def release(self) -> None:
        """Nothing is half done here.

        Raises:
            Stopped: A signal has come meanwhile.
        """
        self.held = False
        if self._received is not None and not ranks.rank():
            signal.setitimer(signal.ITIMER_REAL, 1.0, 1.0)
            raise Stopped(self._received[0], self.told)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received is None:
            self._received = number, now
            if not self.held:
                self.release()
            elif not ranks.rank():
                log.warning("%s: the update is finished first", signal.Signals(number).name)
        elif now - self._received[1] > SAME_S:
            self._end(number)

    def _tick(self, number: int, frame: FrameType | None) -> None:
        """Each second after a stop: end what waits for too long, raise what was swallowed.

        Python drops what is raised in the callback of a weak reference, as imports have them.
        """
        former = self._former.get(signal.SIGALRM)
        if self._received is None and callable(former):
            former(number, frame)  # an alarm of somebody else's
        if self._received is None or self.held:
            return
        error = sys.exception()
        while error is not None and not isinstance(error, Stopped):
            error = error.__context__
        self._ticks += 1
        if self._ticks > TIDY_S:
            self._end(self._received[0])
        if error is None:
            raise Stopped(self._received[0], self.told)

    def _end(self, number: int) -> None:
        ranks.end_others()
        os.write(2, f"{signal.Signals(number).name}: ended at once\n".encode())
        os._exit(128 + number)


_active: StopSignals | None = None


def stop_signals() -> StopSignals | None:
    """The handlers of this process, where it is a command of ours."""
    return _active


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Raise `Stopped` inside this context when a signal comes, and say how the run went.

    A context within another one does nothing, nor does one outside the main thread.
    """
    global _active
    if _active is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _active = StopSignals()
    try:
        _active.install()
        yield
    except Stopped as stop:
        ranks.end_others()
        log.warning("%s: %s", stop.signal.name, stop.told)
        raise
    finally:
        _active.restore()
        _active = None
