"""The command server inside a sandbox: a JSON line in for each command, a JSON line out.

It is sent as source text to a bare interpreter, so it imports nothing outside the standard library
and nothing of this project. As process 1 of its namespace it cannot be killed from inside; not
being dumpable, its pipes cannot be opened through ``/proc`` by others of its user id.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from typing import Any

PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 4, 36
POLL_S = 0.05
PAGE = os.sysconf("SC_PAGE_SIZE")


class Output:
    """The first and the last half of what is written, up to ``size`` bytes."""

    def __init__(self, size: int) -> None:
        self._half = max(1, size // 2)
        self._head, self._tail, self._total = bytearray(), bytearray(), 0

    def add(self, data: bytes) -> None:
        """Take the next piece."""
        self._total += len(data)
        room = self._half - len(self._head)
        self._head += data[:room]
        self._tail = (self._tail + data[room:] if room < len(data) else self._tail)[-self._half :]

    @property
    def missing(self) -> int:
        """Bytes that were dropped from the middle."""
        return self._total - len(self._head) - len(self._tail)

    def text(self) -> str:
        """What is kept, each byte that is no UTF-8 as a surrogate; a line says what is not."""
        gap = b"\n[... %d bytes left out ...]\n" % self.missing if self.missing else b""
        return bytes(self._head + gap + self._tail).decode("utf-8", "surrogateescape")


class Job:
    """One command, from its start until nothing of it is left."""

    def __init__(self, request: dict[str, Any], asker: int) -> None:
        self.request = request
        self.asker = asker  # where requests come from: nothing, until this one is answered
        self.output = Output(request["output_bytes"])
        self.ended: dict[int, int] = {}  # exit status by process id, of all that were reaped
        self.used: dict[int, float] = {}  # and their seconds of processor time
        self.killed_for: str | None = None

    def run(self) -> dict[str, Any]:
        """The reply to the request."""
        start = time.monotonic()
        if "\0" in self.request["command"]:
            raise ValueError("a command can hold no NUL character")
        data = base64.b64decode(self.request["stdin"])
        source, sink = os.pipe()
        process = subprocess.Popen(
            ["/bin/bash", "-c", self.request["command"]],
            cwd=self.request["cwd"],
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=self._limit,
        )
        os.close(source)
        os.set_blocking(sink, False)
        assert process.stdout is not None
        try:
            timed_out = self._watch(process.pid, process.stdout.fileno(), sink, data, start)
        finally:
            self._sweep()
        self._drain(process.stdout.fileno())
        process.stdout.close()
        status = self.ended.get(process.pid, signal.SIGKILL)
        code = process.returncode = os.waitstatus_to_exitcode(status)  # reaped here, not by Popen
        limit = self.request["rlimits"]["RLIMIT_CPU"]
        used = self.used.get(process.pid, 0.0)
        if code == -signal.SIGXCPU or (code == -signal.SIGKILL and used > limit):
            self.killed_for = f"over {limit} seconds of processor time"
        if self.killed_for:
            self.output.add(f"\n[killed: {self.killed_for}]\n".encode())
        return {
            # Of a command that a signal ended: what a shell would say.
            "code": 124 if timed_out else code if code >= 0 else 128 - code,
            "output": self.output.text(),
            "timed_out": timed_out,
            "truncated": self.output.missing > 0,
            "seconds": time.monotonic() - start,
        }

    def _limit(self) -> None:
        for name, value in self.request["rlimits"].items():
            # At the first limit of processor time comes a signal that has a name, then SIGKILL.
            last = value + 1 if name == "RLIMIT_CPU" else value
            resource.setrlimit(getattr(resource, name), (value, last))
        # Where memory ends, it ends for these first.
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
            score.write("1000")

    def _watch(self, pid: int, output: int, sink: int, data: bytes, start: float) -> bool:
        """Feed and read the command until it ends; whether time ran out first."""
        end = start + self.request["wall_s"]
        open_sink: int | None = sink
        if not data:
            os.close(sink)
            open_sink = None
        try:
            while True:
                writable = [] if open_sink is None else [open_sink]
                ready, taking, _ = select.select([output, self.asker], writable, [], POLL_S)
                if self.asker in ready:
                    raise EOFError("who asked has hung up")
                if taking and open_sink is not None:
                    data = feed(open_sink, data)
                    if not data:
                        os.close(open_sink)
                        open_sink = None
                chunk = os.read(output, 1 << 16) if output in ready else None
                if chunk:
                    self.output.add(chunk)
                self._reap()
                if pid in self.ended:
                    return False
                if time.monotonic() > end:
                    return True
                self.killed_for = self._too_much()
                if self.killed_for:
                    return False
        finally:
            if open_sink is not None:
                os.close(open_sink)

    def _too_much(self) -> str | None:
        """What the processes have too much of, together."""
        memory, sockets = self.request["memory_bytes"], self.request["sockets"]
        # Elsewhere the namespace is the machine's own: sockets are not ours alone.
        alone = os.getpid() == 1
        if resident_bytes() + (sent_and_unread_bytes() if alone else 0) > memory:
            return f"together over {memory} bytes of memory"
        if alone and open_sockets() > sockets:
            return f"together over {sockets} sockets"
        return None

    def _drain(self, output: int) -> None:
        """Take what is still in the pipe; all who could write to it are gone."""
        while select.select([output], [], [], 0)[0]:
            chunk = os.read(output, 1 << 16)
            if not chunk:
                return
            self.output.add(chunk)

    def _reap(self) -> None:
        while True:
            try:
                pid, status, used = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self.ended[pid] = status
            self.used[pid] = used.ru_utime + used.ru_stime

    def _sweep(self) -> None:
        """Kill whatever the command left running, daemons too."""
        self._reap()
        while left := others():
            # All at once, as only process 1 can: nothing forks in between.
            for pid in [-1] if os.getpid() == 1 else left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._reap()
            time.sleep(0.0005)
        self._reap()


def others() -> list[int]:
    """Our descendants; as process 1, everything else in the namespace."""
    if os.getpid() == 1:
        return [int(name) for name in os.listdir("/proc") if name.isdigit() and name != "1"]
    found, queue = [], [os.getpid()]
    while queue:
        children = _children(queue.pop())
        found += children
        queue += children
    return found


def _children(pid: int) -> list[int]:
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
        lists = [_words(f"/proc/{pid}/task/{task}/children") for task in tasks]
    except OSError:  # it has just ended
        return []
    return [int(child) for children in lists for child in children]


def _words(path: str) -> list[str]:
    with open(path) as file:
        return file.read().split()


def resident_bytes() -> int:
    """Memory of all processes but this one, shared pages counted in each."""
    total = 0
    for pid in others():
        try:
            total += int(_words(f"/proc/{pid}/statm")[1]) * PAGE
        except (OSError, IndexError):  # it has just ended
            continue
    return total


def open_sockets() -> int:
    """Sockets of our network namespace."""
    lines = _lines("/proc/net/sockstat")
    return int(lines[0].split()[2]) if lines else 0  # sockets: used N


def sent_and_unread_bytes() -> int:
    """What lies in TCP sockets of our network namespace, whose buffers grow by themselves."""
    tables = _lines("/proc/net/tcp")[1:] + _lines("/proc/net/tcp6")[1:]
    queues = [line.split()[4].split(":") for line in tables]
    return sum(int(sent, 16) + int(unread, 16) for sent, unread in queues)


def _lines(path: str) -> list[str]:
    try:
        with open(path) as file:
            return file.readlines()
    except OSError:  # as for tcp6 where there is no IPv6
        return []


def feed(sink: int, data: bytes) -> bytes:
    """What is left of ``data`` after a write; nothing when nobody reads."""
    try:
        return data[os.write(sink, data[: 1 << 16]) :]
    except BrokenPipeError:
        return b""


def serve() -> None:
    """Answer requests until there are no more."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    # Without Python's handler, the kernel keeps it from a process 1.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    quiet = os.open(os.devnull, os.O_RDWR)
    os.dup2(quiet, 0)
    os.dup2(quiet, 1)
    while line := requests.readline():
        request = json.loads(line)
        try:
            reply = Job(request, requests.fileno()).run()
        except EOFError:
            return
        except UnicodeEncodeError:
            reply = {"code": 126, "output": "a command is text: it can hold no surrogate\n"}
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            reply = {"code": 126, "output": f"{type(error).__name__}: {error}\n"}
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


if __name__ == "__main__":
    serve()
    sys.exit(0)
