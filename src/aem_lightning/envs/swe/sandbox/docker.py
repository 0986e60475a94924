"""Sessions in containers, through the ``docker`` command line."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from functools import cache

from aem_lightning.envs.swe.sandbox.base import Isolation, Level, SessionSpec
from aem_lightning.envs.swe.sandbox.bubblewrap import ENVIRONMENT
from aem_lightning.envs.swe.sandbox.session import ServedSession, server_command

IMAGE = "python:3.11-slim"
# What the host's docker command may read: where its daemon and its credentials are.
PASSED_ON = ("PATH", "HOME", "DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_CONFIG")
_KEPT = ("LANG", "PYTHONDONTWRITEBYTECODE", "PAGER")


class DockerSandbox:
    """One container a session: no network, no capabilities, a read-only root, bounded memory.

    Args:
        image: Where a session names none. It needs ``bash``, ``tar``, ``git`` and ``python3``, and
            pytest to be graded with.
        writable_root: Leave the image's own files writable, as images do whose repository lies in
            them (SWE-bench's and R2E-Gym's): the working folder is then the image's own.
    """

    name = "docker"

    def __init__(self, image: str = IMAGE, writable_root: bool = False) -> None:
        self.image = image
        self.writable_root = writable_root

    def probe(self) -> Isolation:
        """Ask the daemon."""
        return _probe()

    def open(self, spec: SessionSpec) -> ServedSession:
        """A session in a new container, which is removed when it closes."""
        name = f"aem-swe-{uuid.uuid4().hex[:12]}"
        environment = {key: os.environ[key] for key in PASSED_ON if key in os.environ}
        return ServedSession(
            self.arguments(spec, name),
            spec,
            environment=environment,
            on_close=[["docker", "rm", "--force", name]],
        )

    def arguments(self, spec: SessionSpec, name: str) -> list[str]:
        """The ``docker run`` command of a session."""
        limits = spec.limits
        variables = {key: ENVIRONMENT[key] for key in _KEPT} | dict(spec.environment)
        writable = [f"/tmp:rw,exec,size={limits.disk_bytes}"]
        if not self.writable_root:
            writable.append(f"{spec.workdir}:rw,exec,mode=1777,size={limits.disk_bytes}")
        return [
            *("docker", "run", "--rm", "--interactive", "--name", name),
            *("--network", "none", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
            *("--pids-limit", str(limits.processes), "--memory", str(limits.memory_bytes)),
            *("--memory-swap", str(limits.memory_bytes), "--hostname", "sandbox"),
            *(() if self.writable_root else ("--read-only", "--user", "65534:65534")),
            *(part for folder in writable for part in ("--tmpfs", folder)),
            *(part for k, v in variables.items() for part in ("--env", f"{k}={v}")),
            *("--workdir", spec.workdir, spec.image or self.image),
            *server_command("python3"),
        ]


@cache
def _probe() -> Isolation:
    if shutil.which("docker") is None:
        return Isolation(False, Level.NONE, "there is no docker command on PATH")
    asked = ["docker", "version", "--format", "{{.Server.Version}}"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Isolation(False, Level.NONE, f"docker does not answer: {error}")
    if said.returncode:
        return Isolation(False, Level.NONE, f"docker has no daemon: {said.stderr.strip()[-300:]}")
    return Isolation(True, Level.CONTAINER, f"docker {said.stdout.strip()}: containers")
