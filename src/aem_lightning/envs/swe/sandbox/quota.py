"""What a container writes into its root folder: bounded by its daemon, else looked at."""

from __future__ import annotations

import logging
import subprocess
import time

from aem_lightning.envs.swe.sandbox.engine import ask, is_podman

log = logging.getLogger(__name__)

LOOK_S = (2.0, 10.0)  # between two looks, by how soon it may be too much
FASTEST = 1 << 30  # bytes a second that a container writes, as far as that goes
PAUSE_S = 0.5  # at most between two questions while a command runs


def daemon_bounds_roots(image: str) -> bool:
    """Whether the daemon can hold the root folder of a container of ``image`` to a size.

    Of the drivers, only overlay on XFS with project quotas is asked: others take the option and do
    nothing (containerd's), or count the image itself (btrfs).
    """
    driver = "{{.Store.GraphDriverName}}" if is_podman() else "{{.Driver}}"
    option = ("--storage-opt", "size=1g")
    try:
        if ask("info", "--format", driver) not in ("overlay2", "overlay"):
            return False
        ask("rm", ask("create", "--pull", "never", *option, "--entrypoint", "true", image))
    except (OSError, subprocess.SubprocessError):
        return False
    return True


class RootWatch:
    """Looks now and then at what a container has written into its root folder.

    A look costs the start of a program, and the daemon a walk through what was written: there is
    one for every few seconds that commands run, and more of them where it may soon be too much.

    Args:
        name: The container's.
        most_bytes: That it may write.
    """

    def __init__(self, name: str, most_bytes: int) -> None:
        self._name = name
        self._most_bytes = most_bytes
        self._asked = time.monotonic()
        self._left = LOOK_S[0]  # seconds of commands until the next look

    def __call__(self) -> str | None:
        """Why the container has to end; asked before every command, and while one runs."""
        now = time.monotonic()
        self._left -= min(now - self._asked, PAUSE_S)
        self._asked = now
        if self._left > 0:
            return None
        words = ("container", "inspect", "--size", "--format", "{{.SizeRw}}", self._name)
        try:
            written = int(ask(*words, seconds=5.0))
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            log.info("What %s has written is not known: %s", self._name, error)
            written = 0
        soonest = (self._most_bytes - written) / FASTEST
        self._left = min(max(soonest, LOOK_S[0]), LOOK_S[1])
        if written <= self._most_bytes:
            return None
        return (
            f"the container was ended: it wrote {written} bytes into its root folder, and may "
            f"write {self._most_bytes}; for more, type datamodule.environment.limits.disk_bytes=N"
        )
