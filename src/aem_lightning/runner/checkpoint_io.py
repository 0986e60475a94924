"""Checkpoint files: written whole, with a seal by which a single flipped bit shows on loading.

A checkpoint of torch is a ZIP archive. Its comment, which every reader passes over, holds the
SHA-256 of all bytes before it.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from aem_lightning.files import write_atomically
from aem_lightning.rollout.journal import UNREADABLE

MARK = b"sha256:"
DIGITS = 2 * hashlib.sha256().digest_size
LENGTH = (len(MARK) + DIGITS).to_bytes(2, "little")  # an archive's last field, before its comment


class SealedCheckpointIO(TorchCheckpointIO):
    """Lightning's reading and writing of checkpoints, for every way in which a trainer saves."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write ``checkpoint`` whole, or leave the file at ``path`` as it was.

        Raises:
            OSError: There is no room.
        """
        if storage_options is not None or "://" in str(path):  # another machine's, as Lightning can
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomically(Path(path), _sealed(buffer))

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """What the file at ``path`` holds.

        Raises:
            ValueError: As `load_whole`.
        """
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only)
        return load_whole(Path(path), map_location, weights_only=weights_only)


def load_whole(
    path: Path, map_location: Any = "cpu", *, weights_only: bool | None = True
) -> dict[str, Any]:
    """What the checkpoint at ``path`` holds, once every bit of it is known to be as written.

    Raises:
        ValueError: The file is damaged, half a file, or none of torch's.
    """
    if not is_whole(path):
        whole = [
            other
            for other in sorted(path.parent.glob("*.ckpt"), key=lambda other: other.stat().st_mtime)
            if other != path and is_whole(other)
        ]
        instead = f"ckpt_path={whole[-1]}, which is whole" if whole else "that of another run"
        raise ValueError(
            f"ckpt_path={path}: this file is damaged: its contents do not fit its checksum, so "
            f"nothing of it is loaded. Type {instead}."
        )
    try:
        stored: dict[str, Any] = torch.load(path, map_location, weights_only=weights_only)
        _ = stored["aem_lightning"]["config"], stored["state_dict"]
    except UNREADABLE as error:
        words = str(error).partition("\n")[0]
        raise ValueError(
            f"ckpt_path={path}: this is no checkpoint of a training run, or only a part of one. "
            "Those of a run are checkpoints/last.ckpt and checkpoints/best.ckpt in its folder; "
            f"ckpt_path=last takes the newest. (Reading it: {type(error).__name__}: {words})"
        ) from error
    return stored


def is_whole(path: Path) -> bool:
    """Whether the file at ``path`` is as it was written, as far as it can tell.

    One without a seal (an older version's, or torch's own) is taken at the word of its archive's
    checksums, which leave headers and padding out; one that is no archive is left to its reader.
    """
    size = path.stat().st_size
    covered = max(0, size - len(LENGTH + MARK) - DIGITS)
    with path.open("rb") as file:
        file.seek(covered)
        seal = file.read()
        # Either of two parts tells a seal, so that a bit flipped in one of them shows.
        if seal.startswith(LENGTH) or MARK in seal:
            file.seek(0)
            return seal == LENGTH + MARK + _digest(file, covered)
    try:
        with zipfile.ZipFile(path) as archive:
            # Its end says that nothing follows, or else a seal was cut off.
            return not archive.comment and seal.endswith(b"\0\0") and archive.testzip() is None
    except (zipfile.BadZipFile, NotImplementedError):
        return True


def _sealed(buffer: io.BytesIO) -> memoryview:
    """The archive in ``buffer``, its comment filled in."""
    covered = buffer.seek(-len(LENGTH), io.SEEK_END)  # where the comment's length, 0, stands
    buffer.seek(0)
    digest = _digest(buffer, covered)
    buffer.seek(covered)
    buffer.write(LENGTH + MARK + digest)
    return buffer.getbuffer()


def _digest(file: Any, length: int, block: int = 1 << 20) -> bytes:
    """SHA-256 of the next ``length`` bytes of ``file``, in hexadecimal digits."""
    digest = hashlib.sha256()
    while length > 0 and (read := file.read(min(block, length))):
        digest.update(read)
        length -= len(read)
    return digest.hexdigest().encode()
