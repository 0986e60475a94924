"""Files that are whole or not there: no kill, full disk or power cut leaves half of one."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_atomically(path: Path, content: str | bytes | memoryview) -> None:
    """Write ``content`` under a hidden name beside ``path``, force it onto the disk, rename it.

    The file that was there stays whole until then. Half a file that a kill leaves under the hidden
    name is nobody's, and the next call writes over it.

    Raises:
        OSError: The disk is full, or the folder cannot be written to; the file before is whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def sync_tree(folder: Path) -> None:
    """Force every file below ``folder`` onto the disk, so that it may be renamed into place."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    with contextlib.suppress(OSError):  # some file systems know no fsync of folders
        os.fsync(descriptor)
    os.close(descriptor)
