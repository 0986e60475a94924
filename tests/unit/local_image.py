"""A container image of this machine's own files: a shell, git, this Python and its pytest."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

from aem_lightning.envs.swe.sandbox.engine import program

_MADE_BY = hashlib.sha256(Path(__file__).read_bytes() + sys.version.encode()).hexdigest()
TAG = f"aem-swe-test:{_MADE_BY[:12]}"
PROGRAMS = (
    *("bash", "sh", "env", "tar", "git", "cat", "ls", "id", "mkdir", "rm", "mv", "ln", "mktemp"),
    *(
        "head",
        "tail",
        "wc",
        "sleep",
        "seq",
        "touch",
        "chmod",
        "grep",
        "tr",
        "df",
        "stat",
        "basename",
    ),
)
PACKAGES = ("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "py")
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
LEFT_OUT = {"test", "tests", "idlelib", "tkinter", "ensurepip", "lib2to3", "site-packages"}


def build(tag: str = TAG, more: Callable[[tarfile.TarFile], None] | None = None) -> str:
    """Make the image, unless it is there already; its name.

    It has ``python3``, and no ``python``; also what ``more`` adds to it.
    """
    if not subprocess.run([program(), "image", "inspect", tag], capture_output=True).returncode:
        return tag
    process = subprocess.Popen([program(), "import", "-", tag], stdin=subprocess.PIPE)
    assert process.stdin is not None
    with process, tarfile.open(fileobj=process.stdin, mode="w|") as archive:
        for name in ("bin", "lib", "lib64", "sbin"):
            link(archive, name, f"usr/{name}")
        programs = [Path("/usr/bin", name) for name in PROGRAMS if shutil.which(name)]
        home = Path("opt/python/lib", f"python{VERSION}")
        standard = Path(sysconfig.get_paths()["stdlib"])
        python = Path(sys.base_prefix, "bin", f"python{VERSION}")
        modules = [*standard.glob("lib-dynload/*.so")]
        for place in {*programs, *libraries([*programs, python, *modules])}:
            add(archive, place, str(place).removeprefix("/"))
        add(archive, python, f"opt/python/bin/python{VERSION}")
        link(archive, "usr/bin/python3", f"/opt/python/bin/python{VERSION}")
        add(archive, standard, str(home))
        site = Path(pytest_home())
        for name in PACKAGES:
            for place in (site / name, site / f"{name}.py", *site.glob(f"{name}-*.dist-info")):
                add(archive, place, str(home / "site-packages" / place.name))
        add(archive, Path("/usr/share/git-core"), "usr/share/git-core")
        if more is not None:
            more(archive)
    assert process.returncode == 0
    return tag


def pytest_home() -> str:
    """The folder that pytest was imported from."""
    import pytest

    return os.path.dirname(os.path.dirname(pytest.__file__))


def add(archive: tarfile.TarFile, place: Path, name: str) -> None:
    """A file, or a folder without what tests of Python itself need."""

    def kept(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        parts = Path(entry.name).parts
        left_out = LEFT_OUT & set(parts[4:]) and "site-packages" not in name
        is_cache = "__pycache__" in parts or entry.name.endswith((".a", ".pyc"))
        entry.uid = entry.gid = 0
        return None if left_out or is_cache or parts[-1].startswith("config-") else entry

    if place.exists():
        archive.add(place.resolve(), name, filter=kept)


def add_text(archive: tarfile.TarFile, name: str, text: str) -> None:
    """A file that anybody may run."""
    entry = tarfile.TarInfo(name)
    entry.mode, entry.size = 0o755, len(text.encode())
    archive.addfile(entry, io.BytesIO(text.encode()))


def link(archive: tarfile.TarFile, name: str, target: str) -> None:
    """A symbolic link."""
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = tarfile.SYMTYPE, target
    archive.addfile(entry)


def libraries(places: Iterable[Path]) -> set[Path]:
    """What these are linked with; below ``/usr`` where the machine has it twice."""
    said = subprocess.run(
        ["ldd", *map(str, places)], capture_output=True, text=True, check=False
    ).stdout
    found = re.findall(r"(/\S+) \(0x", said)
    return {Path("/usr" + p if re.match("/lib(64)?/", p) else p) for p in found}
