"""The host's side of a session: a process that runs the command server, and its two pipes."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import selectors
import subprocess
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import IO, Any

from aem_lightning.envs.swe.sandbox.base import KILLED, CommandResult, SessionSpec

GRACE_S = 10.0  # after a command's own limit, for the server to end it and to answer
CLOSE_S = 60.0
SETTING_UP = 2  # commands: the files, the first commit
UNPACK = "tar -xf - --no-same-owner"
SERVER = files("aem_lightning.envs.swe.sandbox").joinpath("server.py").read_text(encoding="utf-8")


def server_command(python: str) -> list[str]:
    """What starts the command server: isolated from the user's settings, without site-packages."""
    return [python, "-I", "-S", "-c", SERVER]


def tar_of(contents: Mapping[str, bytes]) -> bytes:
    """An archive of files, by their paths relative to where it will be unpacked."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path, data in sorted(contents.items()):
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode = len(data), 0o644
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


class ServedSession:
    """A session on this machine: a command server inside the sandbox, and two pipes to it.

    Args:
        argv: What starts the server; requests go to its standard input.
        spec: What was asked for.
        environment: Of ``argv`` itself, none of the trainer's.
        on_close: Commands that free what ``argv`` leaves, e.g. a container.
        descriptors: Open files for ``argv``, which are closed here.
        problem: Why there is nothing to start.
        at_work: Called once it has been set up, which the first commands do.
        watch: Asked before a command, and twice a second while it runs, why the session has to end.
        processes_by_user: Bound the processes of a command's user, where no others are the same.

    Attributes:
        spec: Of which ``limits`` hold for the next command.
    """

    def __init__(
        self,
        argv: Sequence[str],
        spec: SessionSpec,
        *,
        environment: Mapping[str, str],
        on_close: Sequence[Sequence[str]] = (),
        descriptors: Sequence[int] = (),
        at_work: Callable[[], None] = lambda: None,
        watch: Callable[[], str | None] | None = None,
        processes_by_user: bool = True,
        problem: str | None = None,
    ) -> None:
        self.spec = spec
        self._at_work = at_work
        self._watch = watch or (lambda: None)
        self._processes_by_user = processes_by_user
        self._commands = 0
        self._environment = dict(environment)
        self._on_close = on_close
        self._buffer = b""
        self._why = problem
        self._process: subprocess.Popen[bytes] | None = None
        if problem is not None:
            return
        try:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                env=self._environment,
                bufsize=0,
                pass_fds=descriptors,
            )
        except OSError as error:
            self._why = f"the sandbox cannot be started: {error}"
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

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
        limits = self.spec.limits
        wall_s = limits.wall_s if wall_s is None else wall_s
        output_bytes = output_bytes or limits.output_bytes
        by_user = {"RLIMIT_NPROC": limits.processes} if self._processes_by_user else {}
        request = {
            "command": command,
            "cwd": cwd or self.spec.workdir,
            "wall_s": wall_s,
            "output_bytes": output_bytes,
            "memory_bytes": limits.memory_bytes,
            "sockets": limits.sockets,
            "stdin": base64.b64encode(stdin or b"").decode(),
            "rlimits": {
                "RLIMIT_CPU": limits.cpu_s,
                "RLIMIT_AS": limits.memory_bytes,
                "RLIMIT_FSIZE": limits.file_bytes,
                "RLIMIT_NOFILE": 256,
                "RLIMIT_CORE": 0,
                **by_user,
            },
        }
        self._commands += 1
        if self._commands == SETTING_UP + 1:
            self._at_work()
        start = time.monotonic()
        process = self._process
        if process is None:
            return self._gone(self._why or "the sandbox is closed", start)
        try:
            line = json.dumps(request).encode() + b"\n"
            reply = self._exchange(process, line, wall_s + GRACE_S, output_bytes)
        except BrokenPipeError:
            return self._gone(f"the sandbox ended: {_last_words(process)}", start)
        except (OSError, ValueError) as error:
            return self._gone(f"the sandbox broke: {error}", start)
        if isinstance(reply, str):
            return self._gone(reply, start)
        try:
            data = reply.pop("output").encode(errors="surrogateescape")
            return CommandResult(output=data.decode(errors="replace"), data=data, **reply)
        except (AttributeError, KeyError, TypeError, UnicodeError):
            return self._gone(f"the sandbox answered with {sorted(reply)}", start)

    def put_tar(self, data: bytes, path: str | None = None) -> CommandResult:
        """Unpack an archive below ``path``, by default the working folder."""
        return self.run(UNPACK, cwd=path, stdin=data)

    def alive(self) -> bool:
        """Whether another command can be run."""
        return self._process is not None and self._process.poll() is None

    def close(self) -> None:
        """End every process of the session; a second call does nothing."""
        process, self._process = self._process, None
        if process is None:
            return
        self._why = self._why or "the sandbox is closed"
        process.kill()
        for pipe in (process.stdin, process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()
        process.wait()
        for command in self._on_close:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run(
                    command,
                    env=self._environment,
                    capture_output=True,
                    check=False,
                    timeout=CLOSE_S,
                )

    def __del__(self) -> None:
        self.close()

    def _exchange(
        self, process: subprocess.Popen[bytes], request: bytes, seconds: float, output_bytes: int
    ) -> dict[str, Any] | str:
        """The reply, or why there is none."""
        assert process.stdin is not None
        assert process.stdout is not None
        end = time.monotonic() + seconds
        _write_all(process.stdin, request, end)
        longest = 8 * output_bytes + 10_000  # a byte is at most \\u00xx in JSON
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                left = end - time.monotonic()
                if left <= 0:
                    return "the sandbox did not answer in time"
                if self._process is not process:  # another thread has closed it
                    return "the sandbox is closed"
                if (too_much := self._watch()) is not None:
                    return too_much
                if not selector.select(min(left, 0.5)):
                    continue
                data = os.read(process.stdout.fileno(), 1 << 20)
                if not data:
                    return f"the sandbox ended: {_last_words(process)}"
                self._buffer += data
                if len(self._buffer) > longest:
                    return "the sandbox answered with more than an answer"
        line, _, self._buffer = self._buffer.partition(b"\n")
        reply = json.loads(line)
        # An image may say something of its own first.
        return reply if isinstance(reply, dict) else f"the sandbox answered {line[:200]!r}"

    def _gone(self, why: str, start: float) -> CommandResult:
        self._why = why
        self.close()
        seconds = time.monotonic() - start
        return CommandResult(KILLED, "", seconds=seconds, infra_error=why)


def _write_all(pipe: IO[bytes], data: bytes, end: float) -> None:
    """Write without waiting longer than until ``end`` for a reader.

    Raises:
        TimeoutError: Nobody reads.
    """
    os.set_blocking(pipe.fileno(), False)
    left = memoryview(data)
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_WRITE)
        while left:
            if not selector.select(max(0.0, end - time.monotonic())):
                raise TimeoutError("it does not read what it is asked")
            left = left[os.write(pipe.fileno(), left[: 1 << 16]) :]


def _last_words(process: subprocess.Popen[bytes]) -> str:
    """What a process that is about to end wrote to its error stream."""
    assert process.stderr is not None
    try:
        process.wait(1.0)
    except subprocess.TimeoutExpired:
        return "it closed its output"
    os.set_blocking(process.stderr.fileno(), False)
    said = (process.stderr.read() or b"").decode("utf-8", "replace").strip()
    return said[-500:] or f"exit status {process.returncode}"
