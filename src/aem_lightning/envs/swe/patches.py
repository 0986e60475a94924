"""Unified diffs: written from two texts, and read back as edits."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass

HUNK = re.compile(r"@@ -(\d+)(?:,\d+)? \+\d+(?:,\d+)? @@")
RANGES = re.compile(r"@@ -(\S+) \+(\S+) @@")
TOKEN = re.compile(r"\w+|[^\w\s]+")  # the tools' and the tiny policy's idea of a token


@dataclass(frozen=True)
class Hunk:
    """A part of a diff.

    Attributes:
        path: The file that it changes.
        start: The line of the old file where it starts, from 1.
        old: Its text before, lines around it included.
        new: Its text after.
    """

    path: str
    start: int
    old: str
    new: str


@dataclass(frozen=True)
class TokenFix:
    """A change of one token: which file and line, and what becomes what."""

    path: str
    line: int
    old: str
    new: str


def make_diff(path: str, old: str, new: str) -> str:
    """The diff of one file, as git writes it."""
    lines = difflib.unified_diff(
        old.splitlines(keepends=True), new.splitlines(keepends=True), f"a/{path}", f"b/{path}"
    )
    return f"diff --git a/{path} b/{path}\n" + "".join(lines)


def hunks(diff: str) -> Iterator[Hunk]:
    """The parts of a diff, in order; files that it adds or deletes are left out."""
    before = path = ""
    parts: list[tuple[str, int, list[str], list[str]]] = []
    for line in diff.splitlines(keepends=True):
        head = HUNK.match(line)
        if line.startswith("--- "):
            before = line[4:].strip()
        elif line.startswith("+++ "):
            path = line[4:].strip().removeprefix("b/")
        elif line.startswith("diff --git "):
            path = ""
        elif head is not None:
            parts.append((path if before != "/dev/null" else "", int(head[1]), [], []))
        elif path and parts:
            if line[0] in " -":
                parts[-1][2].append(line[1:])
            if line[0] in " +":
                parts[-1][3].append(line[1:])
    for file, start, old, new in parts:
        if file and file != "/dev/null":
            yield Hunk(file, start, "".join(old), "".join(new))


def reversed_diff(diff: str) -> str:
    r"""The diff that takes ``diff`` back; of files that it renames or packs there is none.

    >>> print(reversed_diff("--- a/m.py\n+++ b/m.py\n@@ -3,2 +3 @@\n x\n-y\n"), end="")
    --- a/m.py
    +++ b/m.py
    @@ -3 +3,2 @@
     x
    +y
    """
    found: list[str] = []
    before, left, right = "", 0, 0  # the name after ---; lines that a hunk still has on each side
    for line in diff.split("\n"):
        head = RANGES.match(line)
        if left > 0 or right > 0:
            left -= line[:1] not in ("+", "\\")
            right -= line[:1] not in ("-", "\\")
            found.append({"+": "-", "-": "+"}.get(line[:1], line[:1]) + line[1:])
        elif head is not None:
            left, right = (int(n.partition(",")[2] or 1) for n in head.groups())
            found.append(f"@@ -{head[2]} +{head[1]} @@{line[head.end() :]}")
        elif line.startswith("--- "):
            before = line[4:]
        elif line.startswith("+++ "):
            after = re.sub("^b/", "a/", line[4:])
            found += [f"--- {after}", f"+++ {re.sub('^a/', 'b/', before)}"]
        elif line.startswith(("new file mode", "deleted file mode")):
            turned = "deleted" if line.startswith("new") else "new"
            found.append(f"{turned} file mode {line.rpartition(' ')[2]}")
        elif not line.startswith("index "):
            found.append(line)
    return "\n".join(found)


def token_fix(diff: str) -> TokenFix | None:
    """The one token that a diff changes; None where it changes more, or one that is not unique."""
    found = list(hunks(diff))
    if len(found) != 1:
        return None
    old, new = found[0].old.splitlines(), found[0].new.splitlines()
    changed = [i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b]
    if len(old) != len(new) or len(changed) != 1:
        return None
    one, other = (TOKEN.findall(lines[changed[0]]) for lines in (old, new))
    places = [i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b]
    if len(one) != len(other) or len(places) != 1 or one.count(one[places[0]]) != 1:
        return None
    line = found[0].start + changed[0]
    return TokenFix(found[0].path, line, one[places[0]], other[places[0]])
