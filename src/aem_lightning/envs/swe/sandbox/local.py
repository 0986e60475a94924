"""Sessions without any isolation, for code that one would run by hand."""

from __future__ import annotations

import os
import sys
import sysconfig
import tempfile
from dataclasses import replace
from typing import Any

from aem_lightning.envs.swe.sandbox.base import CommandResult, Isolation, Level, SessionSpec
from aem_lightning.envs.swe.sandbox.bubblewrap import ENVIRONMENT
from aem_lightning.envs.swe.sandbox.session import ServedSession, server_command


class LocalSandbox:
    """Commands as the trainer's own user, in a temporary folder: limits, but no walls.

    They can read and delete whatever that user can, and reach the network.

    Raises:
        ValueError: Without ``allow_unsafe``.
    """

    name = "local"

    def __init__(self, allow_unsafe: bool = False) -> None:
        if not allow_unsafe:
            raise ValueError(
                "sandbox=local runs what the policy writes as you, without isolation: it can "
                "delete your files. Install bubblewrap and type "
                "datamodule.environment.sandbox=auto, or type "
                "datamodule.environment.allow_unsafe=true"
            )

    def probe(self) -> Isolation:
        """Always usable, never isolated."""
        return Isolation(True, Level.NONE, "no isolation: commands run as the trainer's own user")

    def open(self, spec: SessionSpec) -> ServedSession:
        """A session in a temporary folder, which takes the place of ``spec.workdir``."""
        return _LocalSession(spec)


class _LocalSession(ServedSession):
    """A served session, and the folder that goes with it."""

    def __init__(self, spec: SessionSpec) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="aem-swe-", ignore_cleanup_errors=True)
        self._stands_for = spec.workdir
        folder = self._temporary.name
        environment = {
            **ENVIRONMENT,
            "HOME": folder,
            "PATH": f"{os.path.dirname(sys.executable)}:{os.defpath}",
            "PYTHONPATH": sysconfig.get_paths()["purelib"],
            **spec.environment,
        }
        command = server_command(sys.executable)
        super().__init__(command, replace(spec, workdir=folder), environment=environment)

    def run(self, command: str, *, cwd: str | None = None, **more: Any) -> CommandResult:
        """As anywhere; paths below the working folder are where that is on this machine."""
        if cwd is not None and cwd.startswith(self._stands_for):
            cwd = self._temporary.name + cwd[len(self._stands_for) :]
        return super().run(command, cwd=cwd, **more)

    def close(self) -> None:
        """End every process of the session and remove its folder."""
        super().close()
        self._temporary.cleanup()
