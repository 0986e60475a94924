"""The images of containers: how they get here, and which of them go again."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import logging
import os
import platform
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from aem_lightning.envs.swe.sandbox.engine import ask, environment, program

log = logging.getLogger(__name__)

PULL_S = 1800.0  # for an image of some GB
TOLD_S = 10.0  # between two lines about it
FRESH_S = 300.0  # after an image was asked for: its container may not have been started yet
GB = 10**9  # as docker counts


def pull(image: str, limit_s: float, most_gb: float | None = None) -> str | None:
    """Fetch an image that is not here, and tell how it goes; what went wrong, if something did.

    Args:
        image: Its name.
        limit_s: Seconds for it.
        most_gb: What all images that were fetched so may have, before the least recently used are
            removed; None: keep them.
    """
    try:
        if most_gb is not None:
            with _ledger() as known:  # from now on nobody removes it
                if image in known:
                    known[image]["used"] = time.time()
        with contextlib.suppress(subprocess.CalledProcessError):
            ask("image", "inspect", "--format", "{{.Id}}", image)
            return None
        problem = _fetch(image, limit_s)
        if problem is None:
            _keep(image, most_gb)
        return problem
    except (OSError, subprocess.SubprocessError) as error:
        return f"the image {image} cannot be pulled: {error}"


def pull_all(images: Sequence[str], workers: int) -> list[str]:
    """Fetch images, so many at once, with a line for each; those that cannot be had."""
    numbers = itertools.count(1)

    def one(image: str) -> str | None:
        problem = pull(image, PULL_S)
        said = problem or f"{image} is here"
        log.info("%d of %d: %s", next(numbers), len(images), said)
        return problem

    with ThreadPoolExecutor(workers) as pool:
        return [i for i, problem in zip(images, pool.map(one, images), strict=True) if problem]


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


def _keep(image: str, most_gb: float | None) -> None:
    """Write down that it is ours, and remove others where all of them have too much."""
    found = ask("image", "inspect", "--format", "{{.Id}} {{.Size}}", image).split()
    try:
        with _ledger() as known:
            known[image] = {"id": found[0], "bytes": int(found[1]), "used": time.time()}
            if most_gb is not None:
                _evict(known, most_gb)
    except OSError as error:
        log.warning("The image %s will never be removed, as nobody notes it: %s", image, error)


def _evict(known: dict[str, dict[str, Any]], most_gb: float) -> None:
    for image in sorted(known, key=lambda name: known[name]["used"]):
        all_gb = sum(entry["bytes"] for entry in known.values()) / GB
        if all_gb <= most_gb or time.time() - known[image]["used"] < FRESH_S:
            return
        here = ""
        with contextlib.suppress(subprocess.CalledProcessError):
            here = ask("image", "inspect", "--format", "{{.Id}}", image)
        if here == known[image]["id"]:  # else it is gone, or somebody else's by that name
            try:
                ask("image", "rm", image, seconds=300)
            except subprocess.SubprocessError as error:  # as where a container is made of it
                why = getattr(error, "stderr", None) or str(error)
                log.info("The image %s stays: %s", image, why.strip())
                continue
            text = "Removed the image %s: those of our runs had %.1f GB, and images_gb=%g."
            log.info(text, image, all_gb, most_gb)
        del known[image]


@contextlib.contextmanager
def _ledger() -> Iterator[dict[str, dict[str, Any]]]:
    """What our runs pulled from this machine's daemon; it waits for others who have it open."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    asked = {key: value for key, value in environment().items() if key.startswith(("DOCK", "CONT"))}
    daemon = json.dumps([platform.node(), os.path.basename(program()), asked], sort_keys=True)
    name = hashlib.sha256(daemon.encode()).hexdigest()[:12]
    path = cache / "aem_lightning" / f"images_{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known: dict[str, dict[str, Any]] = {}
        with contextlib.suppress(FileNotFoundError, ValueError):  # half a file is none
            known = json.loads(path.read_text(encoding="utf-8"))
        yield known
        new = path.with_suffix(".new")  # whoever is killed leaves the old one, or this
        new.write_text(json.dumps(known, indent=1), encoding="utf-8")
        new.replace(path)
