"""Sessions in containers, through the command line of ``docker``, or of ``podman``."""

from __future__ import annotations

import os
import subprocess
import uuid
import weakref
from dataclasses import replace
from functools import cache

from aem_lightning.envs.swe.sandbox.base import Isolation, Level, Limits, SessionSpec
from aem_lightning.envs.swe.sandbox.bubblewrap import ENVIRONMENT, NOBODY
from aem_lightning.envs.swe.sandbox.engine import ask, environment, is_podman, program
from aem_lightning.envs.swe.sandbox.images import PULL_S, pull
from aem_lightning.envs.swe.sandbox.quota import RootWatch, daemon_bounds_roots
from aem_lightning.envs.swe.sandbox.session import ServedSession, server_command

IMAGE = "python:3.11-slim"
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
        images_gb: What the images that our runs pulled may have: `pull`.
    """

    name = "docker"

    def __init__(
        self, image: str = IMAGE, writable_root: bool = False, images_gb: float | None = None
    ) -> None:
        self.image = image
        self.writable_root = writable_root
        self.images_gb = images_gb
        self._ahead: ServedSession | None = None
        self._daemon_bounds: bool | None = None  # nobody has asked it yet

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
        problem = pull(spec.image or self.image, PULL_S, self.images_gb)
        return self._start(spec, problem)

    def arguments(self, spec: SessionSpec, name: str) -> list[str]:
        """The ``docker run`` command of a session."""
        limits = spec.limits
        variables = {key: ENVIRONMENT[key] for key in _KEPT}
        if not self.writable_root:  # in an image's own repository, git is as the image has it
            variables |= _OURS | {"HOME": "/tmp", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        variables |= spec.environment
        writable = {"/tmp": "mode=1777"}
        if not self.writable_root:
            # Some releases of runc do not give a folder that they make the mode that is asked for.
            writable[spec.workdir] = f"mode=755,uid={NOBODY},gid={NOBODY}"
        return [
            *(program(), "run", "--rm", "--interactive", "--name", name),
            *("--pull", "never", "--init=false", "--log-driver", "none", "--stop-timeout", "0"),
            *("--network", "none", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
            *("--pids-limit", str(limits.processes), "--memory", str(limits.memory_bytes)),
            *("--memory-swap", str(limits.memory_bytes), "--hostname", "sandbox"),
            *(() if self.writable_root else ("--read-only", "--user", f"{NOBODY}:{NOBODY}")),
            *(("--read-only-tmpfs=false",) if is_podman() else ()),  # it would have no bound
            *(word for pair in writable.items() for word in _in_memory(*pair, limits)),
            *(part for k, v in variables.items() for part in ("--env", f"{k}={v}")),
            *("--workdir", spec.workdir, "--entrypoint", "python3", spec.image or self.image),
            *server_command("python3")[1:],
        ]

    def _start(self, spec: SessionSpec, problem: str | None = None) -> ServedSession:
        name = f"aem-swe-{uuid.uuid4().hex[:12]}"
        arguments, watch = [] if problem else self.arguments(spec, name), None
        if self.writable_root and not problem:
            if self._daemon_bounds is None:
                self._daemon_bounds = daemon_bounds_roots(spec.image or self.image)
            if self._daemon_bounds:
                arguments[2:2] = ["--storage-opt", f"size={spec.limits.disk_bytes}"]
            else:
                watch = RootWatch(name, spec.limits.disk_bytes)
        # The sandbox ends what it started ahead when it is forgotten: nobody may hold it for that.
        itself = weakref.ref(self)

        def start_ahead() -> None:
            if (sandbox := itself()) is not None:
                sandbox._start_ahead(spec)

        return ServedSession(
            arguments,
            spec,
            environment=environment(),
            on_close=[[program(), "rm", "--force", "--volumes", name]],
            at_work=start_ahead,
            watch=watch,
            # By user, they would be counted over all containers; each has a bound of its own.
            processes_by_user=False,
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


def _in_memory(folder: str, options: str, limits: Limits) -> tuple[str, str]:
    """The words for a folder in memory."""
    options = f"size={limits.disk_bytes},nr_inodes={limits.files},{options}"
    if not is_podman():
        return "--tmpfs", f"{folder}:rw,exec,{options}"
    # Its --tmpfs knows neither numbers of files nor owners; a volume goes with the container.
    kind = "volume-opt=type=tmpfs,volume-opt=device=tmpfs"
    return "--mount", f'type=volume,dst={folder},{kind},"volume-opt=o={options}"'


@cache
def _probe() -> Isolation:
    name = os.path.basename(program())
    try:
        version = ask("version", "--format", "{{.Server.Version}}", seconds=20)
    except FileNotFoundError:
        return Isolation(False, Level.NONE, "there is no docker command on PATH, and no podman")
    except subprocess.CalledProcessError as error:
        return Isolation(False, Level.NONE, f"{name} has no daemon: {error.stderr.strip()[-300:]}")
    except (OSError, subprocess.TimeoutExpired) as error:
        return Isolation(False, Level.NONE, f"{name} does not answer: {error}")
    return Isolation(True, Level.CONTAINER, f"{name} {version}: containers")
