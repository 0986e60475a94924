"""Sessions in containers, through the command line of ``docker``, or of ``podman``."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import threading
import time
import uuid
import weakref
from dataclasses import replace
from functools import cache

from aem_lightning.envs.swe.sandbox.base import Isolation, Level, Limits, SessionSpec
from aem_lightning.envs.swe.sandbox.bubblewrap import ENVIRONMENT, NOBODY
from aem_lightning.envs.swe.sandbox.session import ServedSession, server_command

log = logging.getLogger(__name__)

IMAGE = "python:3.11-slim"
PULL_S = 1800.0  # for an image of some GB
TOLD_S = 10.0  # between two lines about it
# What the host's docker command may read: where its daemon and its credentials are.
PASSED_ON = ("PATH", "HOME", "XDG_RUNTIME_DIR", "DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_CONFIG")
_KEPT = ("LANG", "PYTHONDONTWRITEBYTECODE", "PAGER")
_OURS = {key: value for key, value in ENVIRONMENT.items() if key.startswith("GIT_")}


class DockerSandbox:
    """One container a session: no network, no capabilities, a read-only root, bounded memory.

    When a session is at work, the next container of its kind is started ahead: it is fresh, and
    does not have to be waited for.

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
        self._ahead: ServedSession | None = None

    def probe(self) -> Isolation:
        """Ask the daemon."""
        return _probe()

    def open(self, spec: SessionSpec) -> ServedSession:
        """A session in a new container, which is removed when it closes."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead.alive() and _kind(ahead.spec) == _kind(spec):
            ahead.spec = spec
            return ahead
        del ahead  # which ends it
        problem = pull(spec.image or self.image, _environment(), PULL_S)
        return self._start(spec, problem)

    def arguments(self, spec: SessionSpec, name: str) -> list[str]:
        """The ``docker run`` command of a session."""
        limits = spec.limits
        variables = {key: ENVIRONMENT[key] for key in _KEPT}
        if not self.writable_root:  # in an image's own repository, git is as the image has it
            variables |= _OURS | {"HOME": "/tmp", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        variables |= spec.environment
        bounds = f"rw,exec,size={limits.disk_bytes},nr_inodes={limits.files}"
        writable = [f"/tmp:{bounds}"]
        if not self.writable_root:
            # Some releases of runc do not give a folder that they make the mode that is asked for.
            writable.append(f"{spec.workdir}:{bounds},mode=755,uid={NOBODY},gid={NOBODY}")
        return [
            *(_program() or "docker", "run", "--rm", "--interactive", "--name", name),
            *("--pull", "never", "--init=false"),
            *("--network", "none", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
            *("--pids-limit", str(limits.processes), "--memory", str(limits.memory_bytes)),
            *("--memory-swap", str(limits.memory_bytes), "--hostname", "sandbox"),
            *(() if self.writable_root else ("--read-only", "--user", f"{NOBODY}:{NOBODY}")),
            *(part for folder in writable for part in ("--tmpfs", folder)),
            *(part for k, v in variables.items() for part in ("--env", f"{k}={v}")),
            *("--workdir", spec.workdir, "--entrypoint", "python3", spec.image or self.image),
            *server_command("python3")[1:],
        ]

    def _start(self, spec: SessionSpec, problem: str | None = None) -> ServedSession:
        name = f"aem-swe-{uuid.uuid4().hex[:12]}"
        # The sandbox ends what it started ahead when it is forgotten: nobody may hold it for that.
        itself = weakref.ref(self)

        def start_ahead() -> None:
            if (sandbox := itself()) is not None:
                sandbox._start_ahead(spec)

        return ServedSession(
            self.arguments(spec, name),
            spec,
            environment=_environment(),
            on_close=[[_program() or "docker", "rm", "--force", name]],
            at_work=start_ahead,
            problem=problem,
        )

    def _start_ahead(self, spec: SessionSpec) -> None:
        if self._ahead is None or _kind(self._ahead.spec) != _kind(spec):
            self._ahead = self._start(spec)


def _kind(spec: SessionSpec) -> SessionSpec:
    """What is the container's own in a spec; limits of a command are asked for with each."""
    own = spec.limits
    limits = Limits(
        memory_bytes=own.memory_bytes,
        processes=own.processes,
        disk_bytes=own.disk_bytes,
        files=own.files,
    )
    return replace(spec, limits=limits)


def pull(image: str, environment: dict[str, str], limit_s: float) -> str | None:
    """Fetch an image that is not here, and tell how it goes; what went wrong, if something did."""
    program = _program() or "docker"
    try:
        asked = [program, "image", "inspect", "--format", "{{.Id}}", image]
        if not subprocess.run(asked, env=environment, capture_output=True, timeout=60).returncode:
            return None
        log.info("Pulling %s, for %d minutes at most.", image, limit_s // 60)
        process = subprocess.Popen(
            [program, "pull", image],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{program} does not answer: {error}"
    timer = threading.Timer(limit_s, process.kill)
    timer.start()
    told, layers, line = time.monotonic(), 0, ""
    assert process.stdout is not None
    with process, process.stdout:
        for line in process.stdout:
            layers += "Pull complete" in line
            if time.monotonic() - told > TOLD_S:
                told = time.monotonic()
                log.info("Pulling %s: %d layers are here.", image, layers)
    in_time = timer.is_alive()
    timer.cancel()
    if process.returncode == 0:
        log.info("Pulled %s.", image)
        return None
    why = line.strip() if in_time else f"it took longer than {limit_s:.0f} s"
    return f"the image {image} cannot be pulled: {why}"


def _environment() -> dict[str, str]:
    return {key: os.environ[key] for key in PASSED_ON if key in os.environ}


def _program() -> str | None:
    """``docker``, else ``podman``, which takes the same words."""
    return shutil.which("docker") or shutil.which("podman")


@cache
def _probe() -> Isolation:
    program = _program()
    if program is None:
        return Isolation(False, Level.NONE, "there is no docker command on PATH, and no podman")
    asked = [program, "version", "--format", "{{.Server.Version}}"]
    name = os.path.basename(program)
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Isolation(False, Level.NONE, f"{name} does not answer: {error}")
    if said.returncode:
        return Isolation(False, Level.NONE, f"{name} has no daemon: {said.stderr.strip()[-300:]}")
    return Isolation(True, Level.CONTAINER, f"{name} {said.stdout.strip()}: containers")
