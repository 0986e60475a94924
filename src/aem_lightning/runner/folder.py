"""One run a folder: whoever writes there holds a lock, which ends with its process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

LOCK = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # of file systems that know none
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep every other run out of ``folder``, which is made where there is none.

    Other ranks write into the folder of the first, which holds it for them.

    Raises:
        ValueError: Another run is writing there.
    """
    if any(os.environ.get(name, "0") != "0" for name in RANKS):
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        _lock(file, folder)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def check_free(folder: Path) -> None:
    """Raise where a run is writing into ``folder``.

    Raises:
        ValueError: As `held` does.
    """
    if (folder / LOCK).is_file() and not any(name in os.environ for name in RANKS):
        with (folder / LOCK).open("r", encoding="utf-8") as file:
            _lock(file, folder)


def _lock(file: IO[str], folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return
        file.seek(0)
        raise ValueError(
            f"{folder} belongs to a run that is under way ({file.read() or 'of another machine'}). "
            "Wait until it ends, or leave hydra.run.dir and paths.output_dir away: then each run "
            "has a folder of its own."
        ) from error
