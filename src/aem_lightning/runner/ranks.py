"""Several ranks: they share one run, and where one is lost, all end, and it is said why.

Lightning's launcher starts the other ranks of a machine from rank 0, as the same command again, in
its folder. torchrun and srun start all of them at once, on any number of machines: they meet here,
before Hydra makes a folder. Where one of these is lost, its launcher ends the others.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

POLL_S = 0.5
NOTICE_S = 5.0  # between a rank's last word on the network and the end of its process
GRACE_S = 15.0  # what the main thread has to notice by itself that another rank is lost
FAREWELL_S = 60.0  # what other ranks have to end once rank 0 is done

FOREVER = timedelta(days=30)  # a launcher ends who waits for a rank that is lost
STAMP = "AEM_LIGHTNING_TIME"  # the variable that configs/paths names a run's folder by

_others: list[subprocess.Popen[bytes]] = []  # what rank 0 has started, from rank 1 on
_store: Any = None  # what ranks of torchrun or srun tell each other, before there is a group


def rank() -> int:
    """This process's rank, as torchrun, Lightning or SLURM told it; 0 without any of them."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


def several() -> bool:
    """Whether other ranks belong to this one."""
    return bool(_others) or rank() != 0 or _store is not None


def meet() -> None:
    """Let the ranks that torchrun or srun has started agree on one folder for their run.

    Any other process goes its way.
    """
    global _store
    by_slurm = "RANK" not in os.environ and "SLURM_PROCID" in os.environ
    size = int(os.environ.get("SLURM_NTASKS" if by_slurm else "WORLD_SIZE", "1"))
    if size < 2 or not (by_slurm or "RANK" in os.environ) or _store is not None:
        return
    import torch.distributed as dist  # heavy, and needed by every rank

    if by_slurm:
        from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

        if not SLURMEnvironment.detect():  # a shell inside an allocation
            return
        place = SLURMEnvironment()
        host, port = place.main_address, place.main_port
    else:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosts = rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    options = {"wait_for_workers": False, "multi_tenant": True}
    store = dist.TCPStore(host, port, size, hosts, FOREVER, **options)  # type: ignore[attr-defined]
    _store = dist.PrefixStore(  # type: ignore[attr-defined]
        f"aem_lightning/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store
    )
    if not rank():
        _store.set("time", f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}")
    os.environ[STAMP] = _store.get("time").decode()


@contextlib.contextmanager
def first_rank_first(what: str) -> Iterator[None]:
    """Inside, rank 0 of those that `meet` makes ``what`` once; the others then find it made."""
    if _store is not None and rank():
        _store.wait([what], FOREVER)
    yield
    if _store is not None and not rank():
        _store.set(what, "made")


def watch_others(
    folder: Path, flush: Callable[[], object], others: Sequence[subprocess.Popen[bytes]]
) -> None:
    """Let rank 0 end soon after one of ``others``; their last words are in ``folder``.

    ``flush`` is called where this process has to be ended from outside: it may be waiting for ever
    in a collective call, or playing for long before the next.
    """
    _others[:] = others

    def watch() -> None:
        while (reason := lost(folder)) is None:
            time.sleep(POLL_S)
        time.sleep(GRACE_S)
        with contextlib.suppress(Exception):
            flush()
        end_others()
        log.error("%s", reason)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="ranks").start()


def watch_first(folder: Path) -> None:
    """Let another rank end soon after the process that started it."""

    def watch(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(POLL_S)
        log.error("Rank 0 was killed. %s", _go_on(folder))
        os._exit(1)

    threading.Thread(target=watch, args=(os.getppid(),), daemon=True, name="ranks").start()


def lost(folder: Path) -> str | None:
    """Which rank is lost and why, where one is: a line."""
    for number, process in enumerate(_others, 1):
        status = process.poll()
        if not status:
            continue
        said = _last_words(folder, number)
        if status < 0:
            why = f"was killed by {signal.Signals(-status).name}"
            why += ", as the kernel does where memory is short" if -status == signal.SIGKILL else ""
        elif said.is_file():
            why = f"raised {said.read_text(encoding='utf-8').partition(chr(10))[0]} ({said})"
        else:
            why = f"ended with exit status {status}"
        return f"Rank {number} {why}. {_go_on(folder)}"
    return None


def last_word(error: Exception, message: str, folder: Path) -> str:
    """What rank 0 says of ``error`` in one line; any other rank leaves it in ``folder`` and ends.

    Args:
        error: What ended this rank. A collective call raises an error that only echoes the loss of
            another rank.
        message: The same for people.
        folder: The run's.
    """
    is_echo = "gloo" in message or type(error).__name__.startswith("Dist")
    said = _last_words(folder, rank())
    if not is_echo:
        message = " ".join(message.split())
        with contextlib.suppress(OSError):
            said.write_text(f"{message}\n{traceback.format_exc()}", encoding="utf-8")
    if rank():
        time.sleep(GRACE_S if is_echo else 0.0)  # rank 0 finds the one that is lost, and ends this
        sys.exit(1)
    reason, until = None, time.monotonic() + NOTICE_S
    while (
        is_echo
        and (reason := lost(folder) or _said_by_another(folder)) is None
        and time.monotonic() < until
    ):
        time.sleep(POLL_S)
    end_others()
    return reason or f"Rank 0 raised {message} ({said}). {_go_on(folder)}"


def end_others() -> None:
    """End the other ranks at once; their environment workers end with them."""
    for process in _others:
        process.kill()
    _others.clear()  # none of them is lost


def wait_for_others() -> None:
    """Let the other ranks come to their end, once all is done."""
    until = time.monotonic() + FAREWELL_S
    for process in _others:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def _go_on(folder: Path) -> str:
    """What a lost rank means for the run, for people."""
    last = folder / "checkpoints" / "last.ckpt"
    return "All ranks end with it" + (f"; ckpt_path={last} goes on." if last.exists() else ".")


def _said_by_another(folder: Path) -> str | None:
    """What a rank of torchrun or srun, which has ended, has left in ``folder``."""
    for said in sorted(folder.glob("error_rank_[1-9]*.log")) if _store is not None else ():
        first = said.read_text(encoding="utf-8").partition("\n")[0]
        return f"Rank {said.stem.rpartition('_')[2]} raised {first} ({said}). {_go_on(folder)}"
    return None


def _last_words(folder: Path, number: int) -> Path:
    """The file in which a rank other than 0 leaves what it raised, on its first line."""
    return folder / f"error_rank_{number}.log"
