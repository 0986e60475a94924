"""Where the work of an iteration has got to, one beat at a time, for whoever records it.

A beat is a name: of a stage that begins, or "decode_step" or "micro_batch". Without a listener a
beat costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable

# Told of every beat, in this process.
LISTENERS: list[Callable[[str], object]] = []


def beat(name: str) -> None:
    """Say that ``name`` begins."""
    for listener in LISTENERS:
        listener(name)
