"""The images of containers: how they get here."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import threading
import time

from aem_lightning.envs.swe.sandbox.engine import ask, environment, program

log = logging.getLogger(__name__)

PULL_S = 1800.0  # for an image of some GB
TOLD_S = 10.0  # between two lines about it


def pull(image: str, limit_s: float) -> str | None:
    """Fetch an image that is not here, and tell how it goes; what went wrong, if something did."""
    try:
        with contextlib.suppress(subprocess.CalledProcessError):
            ask("image", "inspect", "--format", "{{.Id}}", image)
            return None
        return _fetch(image, limit_s)
    except (OSError, subprocess.SubprocessError) as error:
        return f"the image {image} cannot be pulled: {error}"


def _fetch(image: str, limit_s: float) -> str | None:
    log.info("Pulling %s, for %d minutes at most.", image, limit_s // 60)
    process = subprocess.Popen(
        [program(), "pull", _full_name(image)],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
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


def _full_name(image: str) -> str:
    """With the registry, which podman does not guess.

    >>> _full_name("swebench/flask:1"), _full_name("ghcr.io/swebench/flask:1")
    ('docker.io/swebench/flask:1', 'ghcr.io/swebench/flask:1')
    """
    first, has_more, _ = image.partition("/")
    is_registry = has_more and ("." in first or ":" in first or first == "localhost")
    return image if is_registry else f"docker.io/{image}"
