"""The tables of finished benchmarks as markdown, so that no figure is copied by hand.

python benchmarks/report.py logs/bench/*.json
python benchmarks/report.py logs/bench/*.json --into docs/performance.md
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"


def markdown(results: Mapping[str, Any]) -> str:
    """One benchmark: the machine it ran on, then its tables."""
    machine = results["machine"]
    where = machine["gpu"] or f"{machine['machine']}, {machine['threads']} thread(s)"
    lines = [f"On {where}, torch {machine['torch']}, Python {machine['python']}."]
    for table in results["tables"]:
        lines += ["", f"**{table['title']}**", ""]
        lines.append(_row(table["columns"]))
        lines.append(_row(["---", *["---:"] * (len(table["columns"]) - 1)]))
        lines += [_row(row) for row in table["rows"]]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def beside_others(old: str, new: Mapping[str, str]) -> str:
    """The sections of ``old``, with ``new`` ones in their places or behind them, by title."""
    _, *parts = f"\n{old}".split("\n### ")
    known = {part.partition("\n")[0]: f"### {part.rstrip()}" for part in parts}
    return "\n\n".join((known | new).values())


def between_markers(text: str, new: Mapping[str, str]) -> str:
    """``text`` with ``new`` sections in the place of the old ones; others stay.

    Raises:
        ValueError: The markers are missing.
    """
    before, begin, rest = text.partition(BEGIN)
    old, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the file needs two lines that say where figures go: {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{beside_others(old, new)}\n\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of benchmarks")
    parser.add_argument("--into", type=Path, help="a markdown file with markers; else the terminal")
    options = parser.parse_args(argv)
    parts = {}
    for path in options.results:
        text = markdown(json.loads(path.read_text(encoding="utf-8")))
        title = path.stem.replace("_", " ").capitalize()
        parts[title] = f"### {title}\n\n{text}"
    if options.into is None:
        sys.stdout.write("\n\n".join(parts.values()) + "\n")
        return
    text = between_markers(options.into.read_text(encoding="utf-8"), parts)
    options.into.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
