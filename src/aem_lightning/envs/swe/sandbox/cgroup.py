"""A control group (version 2) for a session: the kernel's own bound on memory and processes."""

from __future__ import annotations

import contextlib
import os
import shlex
import uuid
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from aem_lightning.envs.swe.sandbox.base import Limits

PREFIX = "aem-swe-"
SLACK = 64 << 20  # bytes, for the command server and the kernel's own


@dataclass(frozen=True)
class Group:
    """A control group that a session's processes are in."""

    folder: Path

    @property
    def join(self) -> str:
        """What a shell types to be in it."""
        return f"echo 0 > {shlex.quote(str(self.folder))}/cgroup.procs"

    @property
    def remove(self) -> list[str]:
        """The command that ends and removes it."""
        tries = 'for i in 1 2 3 4 5 6 7 8 9; do rmdir "$1" && exit; sleep 0.1; done'
        return ["sh", "-c", f'echo 1 > "$1/cgroup.kill"; {tries}', "sh", str(self.folder)]


def make_group(limits: Limits, folders: int) -> Group | None:
    """A new group for a session with so many writable folders; None where none can be made."""
    place = _place()
    if place is None:
        return None
    group = Group(place / f"{PREFIX}{os.getpid()}-{uuid.uuid4().hex[:12]}")
    most = limits.memory_bytes + folders * limits.disk_bytes + SLACK
    try:
        group.folder.mkdir()
        (group.folder / "memory.max").write_text(str(most))
        with contextlib.suppress(OSError):  # a kernel without swap has no such file
            (group.folder / "memory.swap.max").write_text("0")
    except OSError:
        with contextlib.suppress(OSError):
            group.folder.rmdir()
        return None
    return group


@cache
def _place() -> Path | None:
    place = find_place(Path("/proc/self"))
    if place is not None:
        _sweep(place)
    return place


def find_place(process: Path) -> Path | None:
    """Where a process can make groups whose memory is bounded: its own group, or one above."""
    try:
        mine = (process / "cgroup").read_text().splitlines()
        mounts = [line.split() for line in (process / "mountinfo").read_text().splitlines()]
    except OSError:
        return None
    own = next((line[3:].lstrip("/") for line in mine if line.startswith("0::")), None)
    found = [Path(m[4]) for m in mounts if m[m.index("-") + 1] == "cgroup2" and m[3] == "/"]
    if own is None or not found:
        return None
    group = found[0] / own
    for place in (group, *group.parents):
        if not place.is_relative_to(found[0]):
            break
        with contextlib.suppress(OSError):
            # A group whose members are processes passes no controller on, so it is often above.
            passed_on = (place / "cgroup.subtree_control").read_text().split()
            writable = os.access(place, os.W_OK) and os.access(place / "cgroup.procs", os.W_OK)
            if "memory" in passed_on and writable:
                return place
    return None


def _sweep(place: Path) -> None:
    """Remove what killed trainers left; a group with a process in it cannot be."""
    for folder in place.glob(f"{PREFIX}*-*"):
        if not Path("/proc", folder.name.split("-")[2]).exists():
            with contextlib.suppress(OSError):
                folder.rmdir()
