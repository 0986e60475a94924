"""Text to index terms, as Lucene's English analyzer makes them.

Words by the Unicode rules (`word_breaks`), a possessive 's taken off, lower case, without 33 stop
words, stemmed. ``7.5``, ``u.s.a`` and ``100x45x45cm`` stay whole; hyphens, slashes and quotes
separate; every ideograph is a word of its own.
"""

from __future__ import annotations

from functools import lru_cache

from aem_lightning.envs.webshop.porter import stem
from aem_lightning.envs.webshop.word_breaks import words

STOP_WORDS = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their then "
    "there these they this to was will with".split()
)
_POSSESSIVE = tuple(quote + s for quote in "'\u2019\uff07" for s in "sS")


class Analyzer:
    """Text to terms."""

    def __call__(self, text: str) -> list[str]:
        """The terms of ``text``, in their order, repetitions included."""
        return list(filter(None, map(_term, words(text))))


@lru_cache(maxsize=500_000)
def _term(word: str) -> str:
    """The term of one word; empty where it has none."""
    if word.endswith(_POSSESSIVE):
        word = word[:-2]
    # A letter at a time, as Java does it: Python looks at neighbours, and makes two of one.
    word = word.lower() if word.isascii() else "".join(letter.lower()[0] for letter in word)
    if word in STOP_WORDS:
        return ""
    if word.isascii():
        return stem(word)
    # To Java a character beyond the first 65,536 is two.
    units = word.encode("utf-16-le")
    pairs = "".join(
        chr(int.from_bytes(units[i : i + 2], "little")) for i in range(0, len(units), 2)
    )
    return stem(pairs).encode("utf-16-le", "surrogatepass").decode("utf-16-le")
