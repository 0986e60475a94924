"""The program that runs containers: ``docker``, or ``podman``, which takes most of its words."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache

# What it may read of the environment: where its daemon, its settings and its credentials are.
PASSED_ON = (
    *("PATH", "HOME", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_DATA_HOME"),
    *("DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_CONFIG", "DOCKER_CERT_PATH", "DOCKER_TLS_VERIFY"),
    *("CONTAINER_HOST", "CONTAINERS_CONF", "CONTAINERS_STORAGE_CONF"),
)


def environment() -> dict[str, str]:
    """Its variables, none of the trainer's others."""
    return {key: os.environ[key] for key in PASSED_ON if key in os.environ}


def program() -> str:
    """``docker`` where it is on PATH, else ``podman``; starting what is not there says so."""
    return shutil.which("docker") or shutil.which("podman") or "docker"


def ask(*words: str, seconds: float = 60.0) -> str:
    """What it answers to a command.

    Raises:
        OSError: It cannot be started.
        subprocess.CalledProcessError: Its exit status is not 0.
        subprocess.TimeoutExpired: It does not answer.
    """
    return subprocess.run(
        [program(), *words],
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=True,
    ).stdout.strip()


def is_podman() -> bool:
    """Whether it is podman, by whatever name."""
    return _is_podman(program())


@cache
def _is_podman(_program: str) -> bool:
    try:
        return ask("--version", seconds=20).startswith("podman")
    except (OSError, subprocess.SubprocessError):
        return False
