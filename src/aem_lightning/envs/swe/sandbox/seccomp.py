"""A filter of system calls, which closes what the limits of a process leave open."""

from __future__ import annotations

import contextlib
import errno
import mmap
import socket
import tempfile
from collections.abc import Iterable
from functools import cache
from typing import Any

# Memory that no process has to keep mapped, so that no sum over processes finds it; then doors
# through which sandboxes were left. Neither builds nor tests need them.
REFUSED = (
    *("memfd_create", "memfd_secret", "msgget", "semget", "shmget"),
    *("add_key", "bpf", "io_uring_setup", "keyctl", "open_by_handle_at", "perf_event_open"),
    *("process_vm_readv", "process_vm_writev", "ptrace", "request_key", "userfaultfd"),
)
# A file's attributes, its access lists among them, which count towards no file system's size.
ATTRIBUTES = ("setxattr", "lsetxattr", "fsetxattr", "setxattrat")
# What is asked and not done: sockets keep the buffers that they are born with, so that their number
# bounds what lies in them.
BUFFERS = (socket.SO_SNDBUF, socket.SO_RCVBUF)
# Shared memory without a file: what was unmapped of it is still there, and belongs to nobody.
SHARED = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS


@cache
def seccomp_program() -> bytes | None:
    """The filter as ``bwrap --seccomp`` reads it; None without pyseccomp or its C library.

    A refused call answers that it is not implemented, as on a kernel without it; one for attributes
    as on a file system without them.
    """
    try:
        import pyseccomp
    except (ImportError, RuntimeError):  # the package, or libseccomp, is not there
        return None
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)

    def answer(number: int, names: Iterable[str], *conditions: Any) -> None:
        for name in names:
            with contextlib.suppress(OSError, ValueError):  # a call newer than the library
                rules.add_rule(pyseccomp.ERRNO(number), name, *conditions)

    answer(errno.ENOSYS, REFUSED)
    answer(errno.EOPNOTSUPP, ATTRIBUTES)
    answer(errno.ENOSYS, ("mmap",), pyseccomp.Arg(3, pyseccomp.MASKED_EQ, SHARED, SHARED))
    for option in BUFFERS:
        level = pyseccomp.Arg(1, pyseccomp.EQ, socket.SOL_SOCKET)
        answer(0, ("setsockopt",), level, pyseccomp.Arg(2, pyseccomp.EQ, option))
    with tempfile.TemporaryFile() as program:
        rules.export_bpf(program)
        program.seek(0)
        return program.read()
