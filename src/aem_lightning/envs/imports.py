"""What an environment brings into its worker process that a worker does without, and from where."""

from __future__ import annotations

import sys
import sysconfig
import traceback
from pathlib import Path
from typing import Any

HEAVY = ("lightning", "torch", "transformers")
LIBRARIES = ("<", sysconfig.get_path("stdlib"), str(Path(__file__).parents[1]))


class ImportWatch:
    """A finder of modules that finds none, and remembers who asked for a heavy package last."""

    def __init__(self) -> None:
        self._lines: dict[str, str] = {}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name in HEAVY:
            self._lines[name] = _asking_line()

    def found(self) -> dict[str, list[str]]:
        """The heavy packages that are loaded by now, by the line that asked for them."""
        lines: dict[str, list[str]] = {}
        for package, line in self._lines.items():
            if package in sys.modules:  # else it was only looked for
                lines.setdefault(line, []).append(package)
        return lines


def _asking_line() -> str:
    """The innermost line of the user's own that is being run, else of a library."""
    frames = [f for f in traceback.extract_stack()[:-2] if not f.filename.startswith("<")]
    own = [
        frame
        for frame in frames
        if not frame.filename.startswith(LIBRARIES) and "-packages" not in frame.filename
    ]
    frame = (own or frames)[-1]
    return f"{frame.filename}:{frame.lineno}: {frame.line}"
