"""What a diff changes, read line by line as ``git apply`` reads it.

The text comes from the agent's sandbox, so it may be anything. What is read otherwise than git
applies it would get past every check of it: hence a line inside that git does not write is an
error, and what is handed on is put together from what was read. Lines end with a line feed alone,
whatever else Python takes for an end.

A diff is bytes, as files are: here as a text whose bytes that are no UTF-8 stand as lone surrogates
(PEP 383), so that `diff_bytes` gives back every one of them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass

_START = "diff --git "
_HUNK = re.compile(r"@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@")
_RENAMED = re.compile(r"(?:rename|copy) (?:from|to) (.+)")
_HEADERS = (
    *("index ", "old mode ", "new mode ", "new file mode ", "deleted file mode "),
    *("similarity index ", "dissimilarity index "),
)
_PACKED = re.compile(r"(?:literal|delta) \d+|[A-Za-z][!-~]+|")


def diff_text(diff: bytes | str) -> str:
    """A diff as it is read here; of its bytes none is lost."""
    return diff if isinstance(diff, str) else diff.decode(errors="surrogateescape")


def diff_bytes(diff: str) -> bytes:
    r"""The bytes that `diff_text` was made of.

    >>> diff_bytes(diff_text(b"+\xfc\r\n"))
    b'+\xfc\r\n'
    """
    return diff.encode(errors="surrogateescape")


class DiffError(ValueError):
    """A line that git does not write; the message says which."""


@dataclass(frozen=True)
class FileChange:
    """The part of a diff that is about one file.

    Attributes:
        paths: Of the file before and after, where it was and is.
        text: The part itself.
        added: The lines that it adds.
        binary: Its content is no text: packed, or left out.
        complete: It holds what it takes to apply it.
    """

    paths: tuple[str, ...]
    text: str
    added: tuple[str, ...]
    binary: bool = False
    complete: bool = True

    @property
    def is_new(self) -> bool:
        """The file was not there before."""
        return "\nnew file mode " in self.text.partition("\n@@ ")[0]


def file_changes(diff: str) -> tuple[FileChange, ...]:
    r"""The parts of a diff, in order, without what stands before them, as warnings do.

    >>> diff = "diff --git a/m.py b/m.py\n--- a/m.py\n+++ b/m.py\n@@ -0,0 +1 @@\n+x\n"
    >>> (part,) = file_changes(diff)
    >>> part.paths, part.added
    (('m.py',), ('x',))

    Raises:
        DiffError: It is no output of ``git diff``.
    """
    lines = diff.split("\n")
    while lines and not lines[-1]:
        lines.pop()
    found = []
    at = next((i for i, line in enumerate(lines) if line.startswith(_START)), len(lines))
    while at < len(lines):
        reader = _Reader(lines, at)
        found.append(reader.read())
        at = reader.at
    return tuple(found)


class _Reader:
    """One file's part of a diff."""

    def __init__(self, lines: list[str], at: int) -> None:
        self.lines, self.at = lines, at
        self.named: list[str] = []
        self.marked: list[str] = []  # the paths after --- and +++, in this order
        self.added: list[str] = []
        self.hunks = 0

    def read(self) -> FileChange:
        start = self.at
        header = self._line()
        binary, complete = False, True
        self.at += 1
        while self.at < len(self.lines) and not self._line().startswith(_START):
            line = self._line()
            if line == "GIT binary patch":
                binary = True
                self._skip_packed()
            elif line.startswith("Binary files ") and line.endswith(" differ"):
                binary, complete = True, False
                self.at += 1
            else:
                self._read_line(line)
        text = "".join(f"{line}\n" for line in self.lines[start : self.at])
        paths = tuple(dict.fromkeys((*self.named, *filter(None, self.marked)))) or _same(header)
        return FileChange(paths, text, tuple(self.added), binary, complete)

    def _read_line(self, line: str) -> None:
        renamed = _RENAMED.fullmatch(line)
        hunk = _HUNK.match(line)
        if hunk and len(self.marked) == 2:
            self._read_hunk(int(hunk[1] or 1), int(hunk[2] or 1))
            return
        if line.startswith(("--- ", "+++ ")[len(self.marked) :][:1]) and not self.hunks:
            self.marked.append(_without_prefix(line[4:]))
        elif renamed and not self.marked:
            self.named.append(_unquoted(renamed[1]))
        elif not (line.startswith(_HEADERS) and not self.marked):
            raise self._error(line)
        self.at += 1

    def _read_hunk(self, old: int, new: int) -> None:
        self.hunks += 1
        self.at += 1
        while old > 0 or new > 0:
            line = self._line() if self.at < len(self.lines) else ""
            if self.at >= len(self.lines) or line[:1] not in ("", " ", "-", "+", "\\"):
                raise self._error(line)
            old -= line[:1] in ("", " ", "-")
            new -= line[:1] in ("", " ", "+")
            if line.startswith("+"):
                self.added.append(line[1:])
            self.at += 1
        if old < 0 or new < 0:
            raise self._error(self.lines[self.at - 1])
        if self.at < len(self.lines) and self._line().startswith("\\ "):
            self.at += 1

    def _skip_packed(self) -> None:
        self.at += 1
        while self.at < len(self.lines) and not self._line().startswith(_START):
            if not _PACKED.fullmatch(self._line()):
                raise self._error(self._line())
            self.at += 1

    def _line(self) -> str:
        return self.lines[self.at]

    def _error(self, line: str) -> DiffError:
        return DiffError(f"line {self.at + 1} of the change is not what git writes: {line[:120]!r}")


def _same(header: str) -> tuple[str, ...]:
    """The path that a header names twice, for files whose content stays or is left out."""
    both = header.removeprefix(_START)
    middle = len(both) // 2
    one, other = both[:middle], both[middle + 1 :]
    if both[middle : middle + 1] == " " and _without_prefix(one) == _without_prefix(other):
        return (_without_prefix(one),)
    raise DiffError(f"the change names no path that git would: {header[:120]!r}")


def _without_prefix(name: str) -> str:
    """A path without ``a/`` or ``b/``; empty for the file that is not there."""
    path = _unquoted(name.removesuffix("\t"))  # git marks the end of a name with blanks
    if path == "/dev/null":
        return ""
    prefix, slash, rest = path.partition("/")
    if prefix not in ("a", "b") or not slash or not rest:
        raise DiffError(f"the change names no path that git would: {name[:120]!r}")
    return rest


def _unquoted(name: str) -> str:
    if not name.startswith('"'):
        return name
    try:
        # Octal escapes and other characters alike are bytes.
        escaped = diff_bytes(name).decode("latin-1")
        return diff_text(ast.literal_eval(escaped).encode("latin-1"))
    except (AttributeError, SyntaxError, ValueError):
        raise DiffError(f"the change names no path that git would: {name[:120]!r}") from None


def text_of(changes: Iterable[FileChange]) -> str:
    """The diff of these parts alone."""
    return "".join(change.text for change in changes)
