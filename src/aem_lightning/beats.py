"""Where the work of an iteration has got to, one beat at a time, for whoever records or shows it.

A beat is a name and a count: a stage that begins, with the rows that it has to pass through;
"decode_step" or "micro_batch", which begins; "rows" or "tokens", so many of which are done. Without
a listener a beat costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable

DONE = ("rows", "tokens")

# Told of every beat, in this process, by whichever thread works.
LISTENERS: list[Callable[[str, int], object]] = []


def beat(name: str, count: int = 0) -> None:
    """Say that ``name`` begins, or that ``count`` of ``name`` are done."""
    for listener in LISTENERS:
        listener(name, count)
