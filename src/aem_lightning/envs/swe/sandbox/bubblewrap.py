"""Sessions in Linux namespaces, through bubblewrap (``bwrap``, version 0.8 or newer)."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from contextlib import closing
from dataclasses import dataclass
from functools import cache

from aem_lightning.envs.swe.sandbox.base import Isolation, Level, SessionSpec
from aem_lightning.envs.swe.sandbox.cgroup import make_group
from aem_lightning.envs.swe.sandbox.seccomp import seccomp_program
from aem_lightning.envs.swe.sandbox.session import ServedSession, server_command

HOME = "/home/agent"
NOBODY = "65534"  # who runs it for root: the limit on processes does not hold for user 0
# By its full name: in a prefix that is /usr there may be no `python`, and another `python3`.
INTERPRETER = f"/opt/python/bin/python{sys.version_info.major}.{sys.version_info.minor}"
ENVIRONMENT = {
    "HOME": HOME,
    "PATH": "/opt/bin:/opt/python/bin:/usr/local/bin:/usr/bin:/bin",
    "PYTHONPATH": "/opt/site",
    "LANG": "C.UTF-8",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    "PAGER": "cat",
    "GIT_PAGER": "cat",
    "GIT_CONFIG_NOSYSTEM": "1",
    **{f"GIT_{who}_NAME": "agent" for who in ("AUTHOR", "COMMITTER")},
    **{f"GIT_{who}_EMAIL": "agent@sandbox" for who in ("AUTHOR", "COMMITTER")},
}


class BubblewrapSandbox:
    """Own namespaces for processes, network, users and files; the kernel is shared.

    Inside are, read-only, ``/usr``, the interpreter that runs the trainer (``/opt/python``) and its
    packages (``/opt/site``, pytest among them); writable and in memory, each of a bounded size, the
    working folder, ``/tmp``, ``/dev/shm`` and the home. No other file of the machine, no network,
    no variable of the trainer. For root, commands run as user 65534.

    With pyseccomp, system calls that no build or test needs are refused. Where control groups
    (version 2) can be made, the kernel bounds the memory of each session, its own part included.

    It stops a model's mistakes and its mischief, not somebody who attacks the kernel.
    """

    name = "bubblewrap"

    def probe(self) -> Isolation:
        """Open a session and see."""
        return _probe()

    def open(self, spec: SessionSpec) -> ServedSession:
        """A session in namespaces of its own; ``spec.image`` is not used."""
        arguments = _arguments(spec, shutil.which("bwrap") or "bwrap")
        filters = []
        if program := seccomp_program():
            source, sink = os.pipe()  # which holds more than a filter
            with os.fdopen(sink, "wb") as pipe:
                pipe.write(program)
            filters.append(source)
            arguments[1:1] = ["--seccomp", str(source)]
        if os.getuid() == 0 or _can_mount():
            arguments = _mounted(arguments, spec)
        group = make_group(spec.limits, len(_folders(spec)))
        if group is not None:
            arguments = ["sh", "-c", f'{group.join} && exec "$@"', "sh", *arguments]
        return ServedSession(
            arguments,
            spec,
            environment={"PATH": os.defpath},
            on_close=[group.remove] if group else [],
            descriptors=filters,
        )


@cache
def _probe() -> Isolation:
    if sys.platform != "linux":
        return Isolation(False, Level.NONE, f"bubblewrap needs Linux, this is {sys.platform}")
    if shutil.which("bwrap") is None:
        hint = "apt install bubblewrap, or dnf install bubblewrap"
        return Isolation(False, Level.NONE, f"there is no bwrap on PATH: {hint}")
    with closing(BubblewrapSandbox().open(SessionSpec())) as session:
        result = session.run("true", wall_s=20)
    if result.code == 0:
        filtered = (
            "system calls filtered"
            if seccomp_program()
            else "no filter of system calls: memory that is not mapped has no bound. "
            "Install libseccomp and pip install 'aem-lightning[swe]'"
        )
        counted = "" if _can_mount() else ", no bound on the number of files"
        works = f"bubblewrap works: own namespaces, a shared kernel, {filtered}{counted}"
        return Isolation(True, Level.NAMESPACES, works)
    why = result.infra_error or result.output.strip()
    return Isolation(
        False,
        Level.NONE,
        f"bwrap is there but opens no sandbox ({why}). Inside Docker, or under Ubuntu's AppArmor "
        "rule for user namespaces, that is common: allow unprivileged user namespaces",
    )


@dataclass(frozen=True)
class _Folder:
    """A writable folder, in memory."""

    place: str
    size: int
    files: int

    @property
    def options(self) -> str:
        return f"size={self.size},nr_inodes={self.files},mode=755,nosuid,nodev"


def _folders(spec: SessionSpec) -> list[_Folder]:
    limits = spec.limits
    return [
        _Folder("/tmp", limits.disk_bytes, limits.files),
        _Folder(spec.workdir, limits.disk_bytes, limits.files),
        _Folder(HOME, 1 << 20, min(1000, limits.files)),
        _Folder("/dev/shm", 16 << 20, min(1000, limits.files)),
    ]


def _arguments(spec: SessionSpec, program: str) -> list[str]:
    mounts = ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "lib", "lib64", "sbin"):
        mounts += ["--symlink", f"usr/{name}", f"/{name}"]
    # /dev/full gives the zeros of /dev/zero, but not the memory that one gets by mapping that.
    mounts += ["--proc", "/proc", "--dev", "/dev", "--dev-bind", "/dev/full", "/dev/zero"]
    for folder in _folders(spec):
        mounts += ["--size", str(folder.size), "--tmpfs", folder.place]
    mounts += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    shared: dict[str, str] = {}
    for place, inside in _sources().items():
        mounts += ["--ro-bind", place, inside]
    for name in ("python", "python3"):
        mounts += ["--symlink", INTERPRETER, f"/opt/bin/{name}"]
    library = sysconfig.get_config_var("INSTSONAME")
    if sysconfig.get_config_var("Py_ENABLE_SHARED") and library:
        # It was linked for another place, and would take the system's library of that name.
        mounts += ["--symlink", f"/opt/python/lib/{library}", f"/opt/lib/{library}"]
        shared = {"LD_LIBRARY_PATH": "/opt/lib"}
    variables = {**ENVIRONMENT, **shared, **spec.environment}
    return [
        program,
        *("--unshare-all", "--unshare-user", "--disable-userns", "--uid", "1000", "--gid", "1000"),
        *("--cap-drop", "ALL", "--hostname", "sandbox", "--new-session", "--die-with-parent"),
        # The server is process 1 itself: bwrap's own would keep the environment that it was given.
        *("--as-pid-1", "--clearenv"),
        *mounts,
        *("--remount-ro", "/dev", "--remount-ro", "/"),
        *(part for pair in variables.items() for part in ("--setenv", *pair)),
        *("--chdir", spec.workdir),
        *server_command(INTERPRETER),
    ]


def _sources() -> dict[str, str]:
    """The interpreter and its packages, by where they are outside."""
    return {sys.base_prefix: "/opt/python", sysconfig.get_paths()["purelib"]: "/opt/site"}


@cache
def _can_mount() -> bool:
    """Whether a mount namespace can be made in which file systems are mounted."""
    command = [*_namespace(), "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True, check=False, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _namespace() -> list[str]:
    own = [] if os.getuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *own, "--mount", "--propagation", "private"]


def _mounted(arguments: list[str], spec: SessionSpec) -> list[str]:
    """The same command in a mount namespace that ends with it, where folders have bounds of ours.

    ``bwrap`` bounds the bytes of what it mounts, not the number of files. For root, an unprivileged
    user runs it. That user may not reach the interpreter, say below ``/root``: so what is bound is
    bound twice, first to a place that anybody can read.
    """
    lines = ["mount -t tmpfs -o mode=755 none /mnt"]
    for number, place in enumerate(_sources()):
        own = f"/mnt/{number}"
        lines += [f"mkdir {own}", f"mount --bind {shlex.quote(place)} {own}"]
        arguments = [own if argument == place else argument for argument in arguments]
    owner, become = "", ""
    if os.getuid() == 0:
        owner = f",uid={NOBODY},gid={NOBODY}"
        become = f"setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups "
    for number, folder in enumerate(_folders(spec)):
        own = f"/mnt/folder{number}"
        lines += [f"mkdir {own}", f"mount -t tmpfs -o {folder.options}{owner} none {own}"]
        at = arguments.index(folder.place) - 3  # --size BYTES --tmpfs PLACE
        arguments[at : at + 3] = ["--bind", own]
    script = " && ".join([*lines, f'exec {become}"$@"'])
    return [*_namespace(), "sh", "-c", script, "sh", *arguments]
