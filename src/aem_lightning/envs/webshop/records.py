"""Records on disk: JSON texts one after the other, read through memory-mapping.

All processes that read a file share its pages, and a record is parsed when it is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

DATA, ENDS = ".json.bin", ".ends.npy"


class Records:
    """The records that `write_records` left at ``path``."""

    def __init__(self, path: Path) -> None:
        data, ends = path.with_name(path.name + DATA), path.with_name(path.name + ENDS)
        self._ends = np.load(ends, mmap_mode="r")
        # A file of no bytes cannot be mapped.
        self._data = np.memmap(data, dtype=np.uint8, mode="r") if data.stat().st_size else b""

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> Any:
        """Record ``number``; negative numbers and those past the end raise IndexError."""
        if not 0 <= number < len(self):
            raise IndexError(f"record {number}; there are {len(self)}")
        start = int(self._ends[number - 1]) if number else 0
        return json.loads(bytes(self._data[start : int(self._ends[number])]))

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))


def write_records(path: Path, records: Iterable[Any]) -> int:
    """Write ``records`` as compact JSON below ``path`` (two files); how many there are."""
    ends: list[int] = []
    position = 0
    with path.with_name(path.name + DATA).open("wb") as file:
        for record in records:
            text = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
            position += file.write(text)
            ends.append(position)
    np.save(path.with_name(path.name + ENDS), np.array(ends, dtype=np.int64))
    return len(ends)
