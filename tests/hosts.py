"""Machines that run sandboxes for others, which are processes of this one."""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator

import psutil
import pytest

from aem_lightning.envs.swe import SweSettings, choose_sandbox
from aem_lightning.envs.swe.sandbox.remote import TOKEN, remote_sandbox
from aem_lightning.envs.swe.serve import Host, make_server

SECRET = "a token of the tests"


class Machine:
    """A host in a process of its own, whose temporary files are below ``folder``."""

    def __init__(self, folder: str, sessions: int = 8, sandbox: str = "local") -> None:
        settings = SweSettings(sandbox, allow_unsafe=True)
        choose = lambda images: choose_sandbox(settings, has_images=images)  # noqa: E731
        server = make_server(("127.0.0.1", 0), Host(choose, SECRET, sessions))
        self.address = f"http://127.0.0.1:{server.server_port}"

        def serve() -> None:
            tempfile.tempdir = folder
            server.serve_forever()

        self.process = multiprocessing.get_context("fork").Process(target=serve)
        self.process.start()
        server.server_close()  # it is the process's now

    def kill(self) -> None:
        """As when somebody pulls the plug."""
        self.process.kill()
        self.process.join()

    def sessions(self) -> int:
        """Sandboxes at work there."""
        return len(psutil.Process(self.process.pid).children())


@contextlib.contextmanager
def some_machines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Machine]]:
    """Starts machines that share a token, and ends them."""
    monkeypatch.setenv(TOKEN, SECRET)
    remote_sandbox.cache_clear()
    started: list[Machine] = []

    def start(**more: int | str) -> Machine:
        started.append(Machine(folder, **more))
        return started[-1]

    with tempfile.TemporaryDirectory() as folder:  # what a killed host leaves goes with it
        yield start
        for machine in started:
            machine.kill()
    remote_sandbox.cache_clear()
