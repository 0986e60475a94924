"""Porter's stemmer as Lucene's ``PorterStemFilter`` has it.

Source: M. F. Porter, An algorithm for suffix stripping (1980), with his two later changes (``bli``
to ``ble``, ``logi`` to ``log``). A doubled consonant at the end is any consonant but l, s and z.
"""

from __future__ import annotations

STEP_2 = (
    "ational:ate tional:tion enci:ence anci:ance izer:ize bli:ble alli:al entli:ent eli:e "
    "ousli:ous ization:ize ation:ate ator:ate alism:al iveness:ive fulness:ful ousness:ous "
    "aliti:al iviti:ive biliti:ble logi:log"
)
STEP_3 = "icate:ic ative: alize:al iciti:ic ical:ic ful: ness:"
RULES_2, RULES_3 = ([r.split(":") for r in step.split()] for step in (STEP_2, STEP_3))
STEP_4 = "al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive ize".split()


def stem(word: str) -> str:
    """The stem of a lower-case word; words of one or two letters are their own."""
    if len(word) < 3:
        return word
    word = _past_and_gerund(_plural(word))
    if word.endswith("y") and "v" in _shape(word[:-1]):
        word = word[:-1] + "i"
    word = _replace(_replace(word, RULES_2), RULES_3)
    return _final_letter(_strip(word))


def _shape(part: str) -> str:
    """``c`` or ``v`` for every letter; a y behind a consonant is a vowel."""
    shape = ""
    for letter in part:
        is_vowel = letter in "aeiou" or (letter == "y" and shape.endswith("c"))
        shape += "v" if is_vowel else "c"
    return shape


def _measure(part: str) -> int:
    """How often a consonant follows a vowel: Porter's m."""
    return _shape(part).count("vc")


def _ends_in_short_syllable(part: str) -> bool:
    """Consonant, vowel, consonant, the last not w, x or y."""
    return _shape(part).endswith("cvc") and part[-1] not in "wxy"


def _plural(word: str) -> str:
    if word.endswith(("sses", "ies")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _past_and_gerund(word: str) -> str:
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    for suffix in ("ed", "ing"):
        if word.endswith(suffix):
            part = word.removesuffix(suffix)
            return _mended(part) if "v" in _shape(part) else word
    return word


def _mended(part: str) -> str:
    """What is left of a word without its -ed or -ing, spelt as a word again."""
    if part.endswith(("at", "bl", "iz")):
        return part + "e"
    if len(part) > 1 and part[-1] == part[-2] and _shape(part)[-1] == "c":
        return part if part[-1] in "lsz" else part[:-1]
    return part + "e" if _measure(part) == 1 and _ends_in_short_syllable(part) else part


def _replace(word: str, rules: list[list[str]]) -> str:
    """The first rule whose suffix fits decides, whether it changes the word or not."""
    for suffix, replacement in rules:
        if word.endswith(suffix):
            part = word.removesuffix(suffix)
            return part + replacement if _measure(part) > 0 else word
    return word


def _strip(word: str) -> str:
    for suffix in STEP_4:
        if word.endswith(suffix):
            part = word.removesuffix(suffix)
            if suffix == "ion" and not part.endswith(("s", "t")):
                return word
            return part if _measure(part) > 1 else word
    return word


def _final_letter(word: str) -> str:
    if word.endswith("e"):
        measure = _measure(word[:-1])
        if measure > 1 or (measure == 1 and not _ends_in_short_syllable(word[:-1])):
            word = word[:-1]
    return word[:-1] if word.endswith("ll") and _measure(word) > 1 else word
