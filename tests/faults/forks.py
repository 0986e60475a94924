"""Commands in forks of this process, with a time limit, and with signals on their way."""

from __future__ import annotations

import contextlib
import os
import random
import runpy
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from runs import COIN, ROOT, SHORT, SMALL

LIMIT_S = 120.0
EXIT_S = 5.0  # what workers have to end after their pool


@dataclass(frozen=True)
class Ended:
    """How a command ended: an exit status, ``None`` where it hung; and what it said."""

    status: int | None
    said: str
    orphans: int

    @property
    def how(self) -> str:
        if self.status is None:
            return "hung"
        if self.orphans:
            return f"left {self.orphans} processes"
        if self.status > 128 or self.status < 0:
            return "stopped"
        if self.status == 0:
            return "went on"
        return "traceback" if "Traceback (most recent call last)" in self.said else "named error"

    @property
    def last_line(self) -> str:
        return next(reversed([line for line in self.said.splitlines() if line.strip()]), "")


@dataclass(frozen=True)
class Try:
    """One try: a folder of its own, a seed, and what all share: the model, undisturbed runs."""

    folder: Path
    seed: int
    shared: Path

    @property
    def rng(self) -> random.Random:
        return random.Random(f"{self.folder.name}/{self.seed}")

    def words(self, folder: Path, *more: str) -> list[str]:
        places = (f"paths.root_dir={folder}", f"paths.data_dir={self.shared}/data")
        return [*COIN, *SMALL, *SHORT, "evaluate=false", f"seed={self.seed}", *places, *more]

    def train(self, *more: str, **how: Any) -> Ended:
        return command("train.py", *self.words(self.folder, *more), **how)

    def undisturbed(self) -> Path:
        """The last checkpoint of the same run without a fault."""
        folder = self.shared / f"seed_{self.seed}"
        if not list(folder.rglob("summary.json")):
            ended = command("train.py", *self.words(folder))
            assert ended.status == 0, ended.said
        return last_checkpoint(folder)


def last_checkpoint(folder: Path) -> Path:
    return max(folder.rglob("last.ckpt"), key=os.path.getmtime)


def command(
    script: str,
    *words: str,
    signals: Sequence[tuple[float, int]] = (),
    prepare: Callable[[], object] = bool,
    limit_s: float = LIMIT_S,
) -> Ended:
    """``python <script> <words>`` in a fork of this process, which has torch imported already.

    ``signals`` are sent so many seconds after the start; ``prepare`` is called in the fork.
    """
    with tempfile.TemporaryFile("w+") as out:
        start = time.monotonic()
        if (child := os.fork()) == 0:
            _run(script, words, out.fileno(), prepare)
        waiting, status = list(signals), None
        while status is None and (passed := time.monotonic() - start) < limit_s:
            while waiting and passed > waiting[0][0]:
                os.kill(child, waiting.pop(0)[1])
            ended, code = os.waitpid(child, os.WNOHANG)
            status = os.waitstatus_to_exitcode(code) if ended else None
            time.sleep(0.01)
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        _, left = psutil.wait_procs(list(_session(child)), timeout=EXIT_S)
        for process in left:
            process.kill()
        out.seek(0)
        return Ended(status, out.read(), len(left))


def _run(script: str, words: Sequence[str], out: int, prepare: Callable[[], object]) -> None:
    status: Any = 1
    try:
        os.setsid()
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = (open(fd, "w", closefd=False) for fd in (1, 2))  # noqa: SIM115
        os.chdir(ROOT)
        sys.argv = [script, *words]
        prepare()
        runpy.run_path(str(ROOT / script), run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code or 0
        if isinstance(status, str):
            sys.stderr.write(status + "\n")
            status = 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _session(leader: int) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                yield process
