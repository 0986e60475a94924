"""Run a command with a Docker daemon at hand: the one that answers, else one of its own.

One of its own needs root and ``dockerd`` on PATH; it has no network, and is gone afterwards with
all that it held. Where there is podman and no docker, none is needed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAM = shutil.which("docker") or shutil.which("podman")
QUIET = ("--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false")


def answers(environment: dict[str, str]) -> bool:
    """Whether there is a daemon."""
    asked = [PROGRAM or "docker", "version", "--format", "{{.Server.Version}}"]
    return not subprocess.run(asked, env=environment, capture_output=True).returncode


def main(command: list[str]) -> int:
    """The command's exit status; 2 where no daemon can be had."""
    if PROGRAM is None:
        print(
            "with_docker: there is no docker on PATH, and no podman: apt install docker.io",
            file=sys.stderr,
        )
        return 2
    environment = dict(os.environ)
    if answers(environment):
        return subprocess.run(command).returncode
    if os.getuid() or not shutil.which("dockerd"):
        print(
            "with_docker: no daemon answers. Start one, or as root have dockerd on PATH "
            "(apt install docker.io)",
            file=sys.stderr,
        )
        return 2
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        place = Path(folder)
        environment["DOCKER_HOST"] = f"unix://{place}/socket"
        folders = [f"--{name}-root={place}/{name}" for name in ("data", "exec")]
        with open(place / "log", "wb") as log:
            address = ["-H", environment["DOCKER_HOST"], f"--pidfile={place}/pid"]
            daemon = subprocess.Popen(
                ["dockerd", *address, *folders, *QUIET, "--bridge=none"],
                stdout=log,
                stderr=log,
            )
        try:
            end = time.monotonic() + 60
            while not answers(environment):
                if daemon.poll() is not None or time.monotonic() > end:
                    print((place / "log").read_text()[-2000:], file=sys.stderr)
                    return 2
                time.sleep(0.5)
            return subprocess.run(command, env=environment).returncode
        finally:
            daemon.terminate()
            daemon.wait(60)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
