"""Words of a text as Lucene's ``StandardTokenizer`` finds them: UAX #29, and emoji as words.

A text is first written in classes, a letter a character (`word_breaks.json`, which
``scripts/unicode_tables.py`` makes from Unicode's data); words are found in that. Source: the
grammar ``StandardTokenizerImpl.jflex`` of Lucene 9, and UAX #29 of Unicode 12.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from string import ascii_letters

LONGEST = 255  # of a word, in UTF-16 units; the rest is another word
TABLE = Path(__file__).with_suffix(".json")
_NOTHING = "."
# What stands between blanks and is not all ASCII: a blank is in no word.
_BEYOND_ASCII = re.compile(r"(?<![!-~])[!-~]*+[^\x00-\x7f][^\x00-\x20]*")
_ASCII = re.compile(r"\w+(?:(?:(?<=[A-Za-z])[.':](?=[A-Za-z])|(?<=\d)[.,;'](?=\d))\w+)*", re.ASCII)


def words(text: str) -> list[str]:
    r"""The words of ``text``, in their order.

    Example:
        >>> words("U.S.A. 1,000 wi-fi \u2605 \u6bdb\u5dfe")
        ['U.S.A', '1,000', 'wi', 'fi', '★', '毛', '巾']
    """
    found: list[str] = []
    start = 0
    for other in _BEYOND_ASCII.finditer(text):
        found += _ascii_words(text[start : other.start()])
        found += _other_words(other[0])
        start = other.end()
    return found + _ascii_words(text[start:])


def _ascii_words(text: str) -> list[str]:
    found = _ASCII.findall(text)
    if any(len(word) > LONGEST or word[0] == "_" for word in found):
        return list(_words(text))
    return found


@lru_cache(maxsize=65_536)
def _other_words(text: str) -> tuple[str, ...]:
    return tuple(_words(text))


def _words(text: str) -> Iterator[str]:
    grammar = _grammar()
    classes = text.translate(grammar.classes)
    start = 0
    while (found := grammar.token.search(classes, start)) is not None:
        start, end = found.span()
        limit = start + LONGEST
        if grammar.emoji_letter.match(classes, start):
            emoji = grammar.emoji.match(classes, start)
            end = max(end, emoji.end() if emoji else 0)
        if end - start > LONGEST // 2 and _units(text[start:end]) > LONGEST:
            while _units(text[start:limit]) > LONGEST:
                limit -= 1
            matches = (p.match(classes, start, limit) for p in (grammar.token, grammar.emoji))
            end = max((match.end() for match in matches if match), default=start)
        if end > start:
            yield text[start:end]
        start = max(end, start + 1)


def _units(text: str) -> int:
    return len(text.encode("utf-16-le")) // 2


class _Classes(dict[int, str]):
    """The letter of the class of each character; found when it is first asked for."""

    def __init__(self, ranges: list[tuple[int, int, str]]) -> None:
        self._ranges = sorted(ranges)
        self._starts = [low for low, _, _ in self._ranges]

    def __missing__(self, point: int) -> str:
        at = bisect_right(self._starts, point) - 1
        _, high, letter = self._ranges[at] if at >= 0 else (0, -1, "")
        self[point] = letter if point <= high else _NOTHING
        return self[point]


class _Grammar:
    """The rules, as patterns over classes.

    Attributes:
        classes: From characters to classes.
        token: A word, emoji or ideograph.
        emoji: An emoji.
        emoji_letter: A letter that is an emoji, too: the longer of both counts.
    """

    def __init__(self, table: dict[str, str]) -> None:
        pairs = zip(ascii_letters, table, strict=False)  # there are fewer classes than letters
        names = {letter: set(kind.split()) for letter, kind in pairs}
        ranges = []
        for letter, spans in zip(names, table.values(), strict=True):
            for span in spans.split():
                low, _, high = span.partition("-")
                ranges.append((int(low, 16), int(high or low, 16), letter))
        self.classes = _Classes(ranges)

        def any_of(*wanted: str) -> str:
            return f"[{''.join(x for x, has in names.items() if has & set(wanted))}]"

        joined = any_of("Joined") + "*"
        numeric, katakana = any_of("Numeric"), any_of("Katakana")
        hebrew, letter = any_of("Hebrew_Letter"), any_of("ALetter", "Hebrew_Letter")
        quote, quotes = any_of("Single_Quote"), any_of("Double_Quote")
        in_word = any_of("MidLetter", "MidNumLet", "Single_Quote")
        in_number = any_of("MidNum", "MidNumLet", "Single_Quote")
        bridge = f"(?:{any_of('ExtendNumLet')}{joined})"
        unit = (
            f"{hebrew}{joined}(?:{quote}{joined}|{quotes}{joined}{hebrew}{joined})"
            f"|{letter}{joined}(?:{in_word}{joined}{letter}{joined})*"
            f"|{numeric}{joined}(?:{in_number}{joined}{numeric}{joined})*"
        )
        run = f"(?:(?:{katakana}{joined})+|(?:{unit})+)"
        word = f"{bridge}*{run}(?:{bridge}+{run})*{bridge}*"

        plain = f"(?:(?!{any_of('Text_Style', 'Emoji_Style')}){any_of('Joined')})*"
        zwj, style = any_of("ZWJ"), any_of("Emoji_Style")
        picture, modifier = any_of("Emoji"), any_of("Emoji_Modifier")
        flag = f"{any_of('Regional_Indicator')}{joined}"
        tags = f"(?:{any_of('Tag')}+{any_of('Tag_End')})?"
        key = f"{any_of('Key')}{plain}{style}?{any_of('Key_Cap')}{plain}"
        one = f"{zwj}*{picture}{plain}(?:{style}(?:{zwj}{modifier}{plain})?)?"
        chain = f"(?:{one}{zwj})*{one}{tags}"
        emoji = f"(?:{modifier}{plain}{zwj})?{chain}|{modifier}{plain}|{key}|{flag}{flag}"

        complex_ = f"(?:{any_of('Complex')}{joined})+"
        alone = f"{any_of('Han', 'Hiragana')}{joined}"
        self.token = re.compile(f"{word}|{emoji}|{complex_}|{alone}")
        self.emoji = re.compile(emoji)
        self.emoji_letter = re.compile(any_of("Emoji") + f"(?<={any_of('ALetter')})")


@cache
def _grammar() -> _Grammar:
    return _Grammar(json.loads(TABLE.read_text(encoding="utf-8")))
