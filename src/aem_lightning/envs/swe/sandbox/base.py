"""What a sandbox is: commands go in, results come out, and every failure is a value."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Annotated, Protocol, runtime_checkable

from annotated_types import Ge

from aem_lightning.types import Positive

WORKDIR = "/testbed"
KILLED = 137  # the exit code of a process that was killed
OVER_CPU = 128 + signal.SIGXCPU  # of one that was over its limit of processor time


Size = Annotated[int, Ge(1)]


@dataclass(frozen=True)
class Limits:
    """Bounds of one command; those in bytes and processes hold for everything it starts, together.

    Attributes:
        wall_s: Seconds until it is killed.
        cpu_s: Seconds of processor time a process.
        memory_bytes: Address space a process, and resident memory of all processes of a session
            together with what lies in their TCP sockets.
        processes: Processes and threads of a session.
        file_bytes: Size of a file.
        disk_bytes: Size of each writable folder, which lie in memory; what a container may write
            into a root folder that is writable.
        files: Files, folders and links in each of them.
        sockets: Of all processes of a session: other kinds keep up to 208 KiB each in the kernel.
        output_bytes: Output that is kept: its beginning and its end, half each.
    """

    wall_s: Positive = 90.0
    cpu_s: Size = 60
    memory_bytes: Size = 1 << 30
    processes: Size = 64
    file_bytes: Size = 64 << 20
    disk_bytes: Size = 256 << 20
    files: Size = 100_000
    sockets: Size = 256
    output_bytes: Size = 64_000

    def ended_by_the_clock(self, wall_s: float) -> Limits:
        """These with ``wall_s``, and a processor limit that an endless loop does not reach first.

        The clock says that it ended a command; a processor limit as short would race it.
        """
        return replace(self, wall_s=wall_s, cpu_s=int(wall_s) + 1)


class Level(IntEnum):
    """What separates a command from the machine; more is better."""

    NONE = 0
    NAMESPACES = 1
    CONTAINER = 2


@dataclass(frozen=True)
class Isolation:
    """What a probe found: whether sessions can be opened here, what isolates them, and why."""

    usable: bool
    level: Level
    reason: str


@dataclass(frozen=True)
class CommandResult:
    """What became of a command.

    Attributes:
        code: Its exit status; 124 after ``timed_out``, 128 and the signal's number after a signal,
            137 when the sandbox is gone.
        output: What it wrote to both streams, in order.
        timed_out: It was killed at its wall-clock limit.
        truncated: The middle of the output is missing.
        seconds: Wall time.
        infra_error: What broke outside the command's doing; the session is then closed.
        data: ``output`` before it was decoded.
    """

    code: int
    output: str
    timed_out: bool = False
    truncated: bool = False
    seconds: float = 0.0
    infra_error: str | None = None
    data: bytes = b""


@dataclass(frozen=True)
class SessionSpec:
    """What to open.

    Attributes:
        workdir: Where commands start, an empty writable folder at first.
        limits: Of its commands.
        image: Container image, for the back ends that have images.
        environment: Variables of its commands beside the back end's own.
    """

    workdir: str = WORKDIR
    limits: Limits = field(default_factory=Limits)
    image: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


class Session(Protocol):
    """One sandbox at work, whose commands leave files but no process."""

    def run(
        self,
        command: str,
        *,
        wall_s: float | None = None,
        cwd: str | None = None,
        stdin: bytes | None = None,
        output_bytes: int | None = None,
    ) -> CommandResult:
        """Run ``command`` with bash; ``wall_s`` and ``output_bytes`` replace the session's."""
        ...

    def put_tar(self, data: bytes, path: str | None = None) -> CommandResult:
        """Unpack an archive below ``path``, by default the working folder."""
        ...

    def alive(self) -> bool:
        """Whether another command can be run."""
        ...

    def close(self) -> None:
        """End every process of the session; a second call does nothing."""
        ...


@runtime_checkable
class Sandbox(Protocol):
    """A way to open sessions."""

    name: str

    def probe(self) -> Isolation:
        """Try it: what isolation there is on this machine, and why not where there is none."""
        ...

    def open(self, spec: SessionSpec) -> Session:
        """A new session. One that cannot be opened says so in its first result."""
        ...
