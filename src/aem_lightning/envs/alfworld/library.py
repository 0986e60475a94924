"""The planner's library without debugging information: 1 MB in place of 34 MB for every env slot.

Every engine loads a copy of ``libdownward.so`` of its own, since the library holds one game. What
the loader maps into memory is the beginning of the file; the rest is symbols for a debugger.
"""

from __future__ import annotations

import logging
import os
import struct
from pathlib import Path

from aem_lightning.envs.alfworld.package import import_optional

logger = logging.getLogger(__name__)

ELF64_LITTLE_ENDIAN = b"\x7fELF\x02\x01"
SEGMENT = "<I4xQ16xQ16x"  # its kind, its place in the file, its length there
LOADED = 1  # PT_LOAD


def use_trimmed_library() -> None:
    """Make engines of this process copy a trimmed library; where that fails, they copy all.

    The trimmed file has no name in any folder, so nothing is left behind, however the process ends.
    """
    interface = import_optional("fast_downward.interface")
    if not hasattr(os, "memfd_create"):
        return
    trimmed = trim(Path(interface.DOWNWARD_LIB_PATH).read_bytes())
    if trimmed is None:
        logger.info("%s has a layout that is not trimmed", interface.DOWNWARD_LIB_PATH)
        return
    with os.fdopen(os.memfd_create("libdownward"), "wb", closefd=False) as file:
        file.write(trimmed)
        interface.DOWNWARD_LIB_PATH = f"/proc/self/fd/{file.fileno()}"


def trim(library: bytes) -> bytes | None:
    """What a loader needs of an ELF library; None where the format is another one.

    Everything behind the last segment that is loaded goes, and with it the table of sections, which
    only linkers and debuggers read.
    """
    if not library.startswith(ELF64_LITTLE_ENDIAN):
        return None
    (segments,) = struct.unpack_from("<Q", library, 0x20)
    size, number = struct.unpack_from("<HH", library, 0x36)
    end = segments + size * number
    for kind, offset, in_file in struct.iter_unpack(SEGMENT, library[segments:end]):
        if kind == LOADED:
            end = max(end, offset + in_file)
    header = bytearray(library[:0x40])
    struct.pack_into("<Q", header, 0x28, 0)  # offset of the section table
    struct.pack_into("<HH", header, 0x3C, 0, 0)  # its length, and the section of names
    return bytes(header) + library[0x40:end]
