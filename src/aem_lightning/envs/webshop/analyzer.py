"""Text to index terms, as Lucene 8's English analyzer makes them.

Words by the Unicode rules (UAX #29), a possessive 's taken off, lower case, without 33 stop words,
stemmed. ``7.5``, ``u.s.a`` and ``100x45x45cm`` stay whole; hyphens, slashes and quotes separate;
every ideograph is a word of its own.
"""

from __future__ import annotations

import re
from functools import lru_cache

from aem_lightning.envs.webshop.porter import stem

STOP_WORDS = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their then "
    "there these they this to was will with".split()
)
_LETTER = r"[^\W\d_]"
# Full stops, colons and apostrophes join letters; full stops, commas and the like join digits.
_WORD = re.compile(
    rf"\w+(?:(?:(?<={_LETTER})[.':\u00b7\u2018\u2019\u2024\u2027](?={_LETTER})"
    rf"|(?<=\d)[.,;'\u2018\u2019\u2024](?=\d))\w+)*"
)
_IDEOGRAPH = re.compile("[\u3040-\u309f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
# Python counts superscripts and fractions as word characters, UAX #29 does not.
_NO_WORD = re.compile("[\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209c\u2150-\u215f]")
_POSSESSIVE = ("'s", "\u2019s", "'S", "\u2019S")


class Analyzer:
    """Text to terms."""

    def __call__(self, text: str) -> list[str]:
        """The terms of ``text``, in their order, repetitions included."""
        if not text.isascii():
            text = _IDEOGRAPH.sub(r" \g<0> ", _NO_WORD.sub(" ", text))
        return list(filter(None, map(_term, _WORD.findall(text))))


@lru_cache(maxsize=500_000)
def _term(word: str) -> str:
    """The term of one word; empty where it has none."""
    if word.endswith(_POSSESSIVE):
        word = word[:-2]
    word = word.lower()
    return "" if word in STOP_WORDS or not word.strip("_") else stem(word)
