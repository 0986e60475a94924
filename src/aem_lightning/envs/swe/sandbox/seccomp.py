"""A filter of system calls, which closes what the limits of a process leave open."""

from __future__ import annotations

import contextlib
import errno
import tempfile
from functools import cache

# Memory that no process has to keep mapped, so that no sum over processes finds it; then doors
# through which sandboxes were left. Neither builds nor tests need them.
REFUSED = (
    *("memfd_create", "memfd_secret", "msgget", "semget", "shmget"),
    *("add_key", "bpf", "io_uring_setup", "keyctl", "open_by_handle_at", "perf_event_open"),
    *("process_vm_readv", "process_vm_writev", "ptrace", "request_key", "userfaultfd"),
)


@cache
def seccomp_program() -> bytes | None:
    """The filter as ``bwrap --seccomp`` reads it; None without pyseccomp or its C library.

    A refused call answers that it is not implemented, as on a kernel without it.
    """
    try:
        import pyseccomp
    except (ImportError, RuntimeError):  # the package, or libseccomp, is not there
        return None
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    for name in REFUSED:
        with contextlib.suppress(OSError, ValueError):  # a call newer than the library
            rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), name)
    with tempfile.TemporaryFile() as program:
        rules.export_bpf(program)
        program.seek(0)
        return program.read()
