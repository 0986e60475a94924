"""Write the table of word breaks that WebShop's search splits text by, from Unicode's own data.

Lucene 9.5's StandardTokenizer reads those of Unicode 12.1, which the npm package
``@unicode/unicode-12.1.0`` holds. For another release of Lucene change the version, and run

    python scripts/unicode_tables.py
"""

from __future__ import annotations

import io
import json
import re
import tarfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

TABLE = Path(__file__).parents[1] / "src/aem_lightning/envs/webshop/word_breaks.json"
PACKAGE = "https://registry.npmjs.org/@unicode%2funicode-12.1.0"
WORD_BREAKS = [
    "ALetter",
    "Hebrew_Letter",
    "Numeric",
    "Katakana",
    "ExtendNumLet",
    "Single_Quote",
    "Double_Quote",
    "MidLetter",
    "MidNumLet",
    "MidNum",
    "Format",
    "Extend",
    "ZWJ",
    "Regional_Indicator",
]
# The name of a property here, and its path in the package.
PROPERTIES = {
    **{name: f"Word_Break/{name}" for name in WORD_BREAKS},
    **{
        name: f"Binary_Property/{name}"
        for name in ("Emoji", "Emoji_Modifier", "Extended_Pictographic")
    },
    "Han": "Script/Han",
    "Hiragana": "Script/Hiragana",
    "Complex": "Line_Break/Complex_Context",
    "Full_Width": "Block/Halfwidth_And_Fullwidth_Forms",
    "Digit": "General_Category/Decimal_Number",
}
SINGLE = {
    "Key_Cap": [0x20E3],
    "Text_Style": [0xFE0E],
    "Emoji_Style": [0xFE0F],
    "Tag": range(0xE0020, 0xE007F),
    "Tag_End": [0xE007F],
    "Key": map(ord, "0123456789#*"),
}
# Emoji that the grammar counts as such only where they are Extended_Pictographic, too.
NO_EMOJI = {*map(ord, "0123456789#*\u00a9\u00ae\u2122\u3030\u303d")}


def read() -> dict[str, set[int]]:
    """The code points that have each of the properties."""
    with urllib.request.urlopen(PACKAGE, timeout=60) as answer:
        package = json.load(answer)
    release = package["versions"][package["dist-tags"]["latest"]]
    with urllib.request.urlopen(release["dist"]["tarball"], timeout=60) as answer:
        content = io.BytesIO(answer.read())
    found = {}
    with tarfile.open(fileobj=content) as archive:
        for name, path in PROPERTIES.items():
            # Short lists stand in one file as they are, long ones in another, coded.
            points, ranges = (
                (archive.extractfile(f"package/{path}/{kind}.mjs") or content).read().decode()
                for kind in ("code-points", "ranges")
            )
            if listed := re.search(r"\[([\d,]+)\]", points):
                found[name] = set(map(int, listed[1].split(",")))
            else:
                found[name] = set(decoded(re.findall(r"decodeRanges\('(.*)'\)", ranges)[0]))
    return found


def decoded(text: str) -> Iterator[int]:
    """The code points of a list: gaps and lengths in turn, each one to four digits of 6 bits."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    digits, numbers = iter(map(alphabet.index, text)), []
    for first in digits:
        more = 0 if first < 32 else 1 if first < 48 else 2 if first < 56 else 3
        number = first & (31, 15, 7, 7)[more]
        for _ in range(more):
            number = number << 6 | next(digits)
        numbers.append(number)
    end = -1
    for gap, length in zip(numbers[::2], numbers[1::2], strict=True):
        start = end + 1 + gap
        end = start + 1 + length
        yield from range(start, end)


def classes(properties: dict[str, set[int]]) -> dict[str, list[str]]:
    """Ranges of code points by what they are: the names of all their properties, joined."""
    named = {point: [] for points in properties.values() for point in points}
    for name, points in sorted(properties.items()):
        for point in points:
            named[point].append(name)
    ranges: dict[str, list[list[int]]] = {}
    for point in sorted(named):
        kind = ranges.setdefault(" ".join(named[point]), [])
        if kind and kind[-1][1] == point - 1:
            kind[-1][1] = point
        else:
            kind.append([point, point])
    return {
        kind: [f"{low:x}-{high:x}" if high > low else f"{low:x}" for low, high in found]
        for kind, found in sorted(ranges.items())
    }


def main() -> None:
    """Fetch, join and write."""
    found = read() | {name: set(points) for name, points in SINGLE.items()}
    found["Numeric"] |= found.pop("Full_Width") & found.pop("Digit")
    found["Emoji"] -= NO_EMOJI | found["Regional_Indicator"] | found["Emoji_Modifier"]
    found["Emoji"] |= found.pop("Extended_Pictographic")
    found["Joined"] = found.pop("Format") | found.pop("Extend") | found["ZWJ"]
    kinds = classes(found)
    lines = ",\n".join(f'"{kind}": "{" ".join(ranges)}"' for kind, ranges in kinds.items())
    TABLE.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
