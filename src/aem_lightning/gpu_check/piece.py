"""A piece of the check, where its figures lie, and what it is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aem_lightning.files import write_atomically

Figures = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """What every piece is told.

    Attributes:
        device: ``cuda``, or ``cpu``, where shapes are small: that proves the command alone.
        folder: Where figures, logs, models and runs go.
        root: The checkout, with ``configs``, ``tests`` and ``benchmarks``.
    """

    device: str
    folder: Path
    root: Path

    @property
    def small(self) -> bool:
        """Whether shapes are those of a machine without a GPU."""
        return self.device == "cpu"

    def file(self, name: str) -> Path:
        """Where the figures of the piece ``name`` lie."""
        return self.folder / f"{name}.json"

    def earlier(self, name: str) -> Figures | None:
        """The figures of a piece that was green on this device before."""
        if not self.file(name).is_file():
            return None
        found: Figures = json.loads(self.file(name).read_text(encoding="utf-8"))
        return found if found["device"] == self.device and found["red"] is None else None

    def keep(self, name: str, figures: Figures) -> None:
        """Write the figures of a piece."""
        write_atomically(self.file(name), json.dumps(figures, indent=2))


@dataclass(frozen=True)
class Piece:
    """One piece.

    Attributes:
        name: What it is called on the command line.
        about: What it shows, in words.
        measure: Gives its figures; ``red`` among them says what is wrong.
        environment: Variables that it runs under, on a GPU.
    """

    name: str
    about: str
    measure: Callable[[Check], Figures]
    environment: Mapping[str, str] = field(default_factory=dict)
