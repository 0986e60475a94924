"""Texts with every word of the embedded instances in the words dialect, for a tokenizer."""

from __future__ import annotations

from aem_lightning.envs.swe.invention import invent
from aem_lightning.envs.swe.libraries import load_libraries
from aem_lightning.envs.swe.mutations import CALLS
from aem_lightning.envs.swe.patches import TOKEN
from aem_lightning.envs.swe.words import (
    FAILS,
    FINISH,
    HOLDS,
    SWAPS,
    TEST,
    UNDO,
    spoken,
    swap_action,
    view_action,
)

SENTENCES = (
    HOLDS,
    FAILS,
    TEST,
    UNDO,
    FINISH,
    "` a ` gives a wrong result",
    "nothing happens .",
    "The work is handed in.",
    "The time of this episode is up.",
)


def vocabulary_texts() -> list[str]:
    """Texts that hold every word of observations and actions at least once."""
    libraries = (*load_libraries(), *(invent(0, number) for number in range(40)))
    sources = [library.core for library in libraries]
    longest = max(source.count("\n") for source in sources)
    said = sorted(
        {int(word) for text in sources for word in TOKEN.findall(text) if word.isdecimal()}
    )
    texts = [*SENTENCES, *(view_action(library.name) for library in libraries)]
    # Lines are shown behind their number, with their indentation; actions say names in lower case.
    lines = [line for source in sources for line in source.splitlines() if line.strip()]
    texts += [text for line in lines for text in (f"1 {line}", spoken(line))]
    texts += [f"\n{number}" for number in range(longest + 2)]
    texts += [swap_action(1, old, new) for old, others in SWAPS.items() for new in others]
    texts += [f"{old} {new}" for old, new in CALLS.items()]
    texts += [f"{number - 1} {number} {number + 1}" for number in said]
    return [text for text in texts if text.strip()]
