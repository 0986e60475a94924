"""The file tools, as a script that runs inside the sandbox: one JSON request in, text out.

The host sends this file's own text to the sandbox's Python, so it needs nothing but the standard
library. A request has ``tool`` and the tool's arguments; the exit status is 0, or 1 where the
request cannot be done and the text says why.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import os
import re
import stat
import sys

SHOWN = 10000  # characters of a file
LONGEST = 16 << 20  # bytes of one
MATCHES = 100
DEPTH = 2
CODING = re.compile(rb"(?:[ \t\f]*(?:#[^\n]*)?\r?\n)?[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)")
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


class ToolError(Exception):
    """A request that cannot be done."""


def view(path: str = ".", view_range: str = "", root: str = ".") -> str:
    """A file with line numbers, or what a folder holds, two levels deep."""
    place = locate(path, root)
    if os.path.isdir(place):
        return list_folder(place, path)
    lines = lines_of(read(place, path))
    first, last = numbers(view_range, len(lines))
    return numbered(lines, first, last)


def create(path: str, file_text: str = "", root: str = ".") -> str:
    """A new file."""
    place = locate(path, root, must_exist=False)
    if os.path.exists(place):
        raise ToolError(path + " exists already; change it with str_replace")
    write(place, plain(file_text), remember=False)
    return "File created: " + path


def str_replace(path: str, old_str: str, new_str: str = "", root: str = ".") -> str:
    """Put one text in the place of another, which has to occur exactly once."""
    place = locate(path, root)
    text = read(place, path)
    end = line_end(text)
    if old_str not in text:  # shown without its line ends, and typed with others
        old_str = with_ends(old_str, end)
    count = text.count(old_str) if old_str else 0
    if count != 1:
        raise ToolError(
            f"old_str occurs {count} times in {path}; it has to occur exactly once. Copy it from "
            "the file, blanks included, with enough lines around it"
        )
    head, tail = text.split(old_str)
    new_str = with_ends(new_str, line_end(old_str) if "\n" in old_str else end)
    return change(place, path, head + new_str + tail, head, new_str)


def insert(path: str, insert_line: str, new_str: str = "", root: str = ".") -> str:
    """Put lines behind a line; 0 is the top."""
    place = locate(path, root)
    text = read(place, path)
    lines, end = lines_of(text, keep_ends=True), line_end(text)
    after = whole_number(insert_line, "insert_line")
    if not 0 <= after <= len(lines):
        raise ToolError(f"insert_line={after}; the file has {len(lines)} lines")
    if lines[:after] and not lines[after - 1].endswith(("\n", "\r")):
        lines[after - 1] += end
    new = with_ends(new_str if new_str.endswith("\n") else new_str + "\n", end)
    head = "".join(lines[:after])
    return change(place, path, head + new + "".join(lines[after:]), head, new)


def undo_edit(path: str, root: str = ".") -> str:
    """Take the last change of a file back."""
    place = locate(path, root)
    kept = history(place)
    if not kept:
        raise ToolError(path + " has no change to take back")
    write(place, data_of(kept[-1], path), remember=False)
    os.remove(kept[-1])
    return "The last change of " + path + " is taken back."


def search(search_term: str, path: str = ".", root: str = ".") -> str:
    """The lines that hold a text, in a file or in the Python files of a folder."""
    place = locate(path, root)
    found = []
    for name in python_files(place) if os.path.isdir(place) else [place]:
        for number, line in enumerate(lines_of(read(name, name)), 1):
            if search_term in line:
                found.append(f"{os.path.relpath(name)}:{number}: {line.strip()[:200]}")
    if not found:
        return f"No line holds {search_term!r} in {path}."
    more = len(found) - MATCHES
    notice = [f"... and {more} more; search in one file, or for a longer text"] if more > 0 else []
    return "\n".join(found[:MATCHES] + notice)


# -------------------------------------------------------------------------------------- their parts


def locate(path: str, root: str, must_exist: bool = True) -> str:
    """A path of the request; the working folder may be somewhere else than ``root`` says."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise ToolError(f"path={path!r} holds a surrogate, which no file's name can") from None
    if "\0" in path:
        raise ToolError(f"path={path!r} holds a NUL character, which no file's name can")
    if path == root or path.startswith(root + "/"):
        path = "." + path[len(root) :]
    if must_exist and not os.path.exists(path):
        raise ToolError(path + " does not exist; look with view what there is")
    return path


def data_of(place: str, path: str) -> bytes:
    """The bytes of a file."""
    try:
        with open(place, "rb", opener=opened) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ToolError(path + " is no regular file")
            data = file.read(LONGEST + 1)  # some of /proc have no end
    except OSError as error:
        raise ToolError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > LONGEST:
        raise ToolError(f"{path} is over {LONGEST >> 20} MiB; look at a part with a command")
    return data


def opened(place: str, flags: int) -> int:
    """A descriptor; a FIFO is not waited for."""
    return os.open(place, flags | os.O_NONBLOCK, 0o666)


def read(place: str, path: str) -> str:
    """The text of a file; what cannot be decoded stands as surrogates, and is written as it was."""
    data = data_of(place, path)
    return data.decode(*coding_of(data))


def encoded(place: str, text: str) -> bytes:
    """A text as bytes of the file that it is to replace."""
    coding, errors = coding_of(data_of(place, place))
    try:
        return text.encode(coding, errors)
    except UnicodeEncodeError as error:
        wrong = text[error.start : error.end]
        raise ToolError(f"{place} is written in {coding}, which has no {wrong!r}") from error


def plain(text: str) -> bytes:
    """A text as UTF-8."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        wrong = text[error.start : error.end]
        raise ToolError(f"file_text holds {wrong!r}, a surrogate, which no text can") from None


def coding_of(data: bytes) -> tuple[str, str]:
    """The encoding of a file and what to do with other bytes: as it says (PEP 263), else UTF-8."""
    said = CODING.match(data)
    marked = [name for mark, name in MARKS if data.startswith(mark)]
    for coding in marked + ([said[1].decode()] if said else []):
        try:
            if data.decode(coding).encode(coding) == data:
                return coding, "strict"
        except (LookupError, ValueError):  # there is none of that name, or the file is not in it
            continue
    return "utf-8", "surrogateescape"


def lines_of(text: str, keep_ends: bool = False) -> list[str]:
    """The lines of a text as Python and git count them, who break none at a form feed."""
    lines = io.StringIO(text, newline="").readlines()
    return lines if keep_ends else [line.rstrip("\r\n") for line in lines]


def line_end(text: str) -> str:
    """What ends most lines of a file."""
    if "\n" not in text and "\r" in text:
        return "\r"
    return "\r\n" if 2 * text.count("\r\n") > text.count("\n") else "\n"


def with_ends(text: str, end: str) -> str:
    """A text of the request with the line ends of a file."""
    return re.sub("\r?\n", end, text)


def write(place: str, data: bytes, remember: bool = True) -> None:
    """Write a file; what it held before is kept for `undo_edit`."""
    try:
        if remember:
            folder = os.path.join(".git", "undo")
            os.makedirs(folder, exist_ok=True)
            name = f"{key_of(place)}.{len(history(place)):06}"
            with open(os.path.join(folder, name), "wb", opener=opened) as file:
                file.write(data_of(place, place))
        os.makedirs(os.path.dirname(place) or ".", exist_ok=True)
        with open(place, "wb", opener=opened) as file:
            file.write(data)
    except OSError as error:
        raise ToolError(f"{place} cannot be written: {error.strerror}") from error


def history(place: str) -> list[str]:
    """The earlier versions of a file, the last one last."""
    folder = os.path.join(".git", "undo")
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return [os.path.join(folder, name) for name in names if name.startswith(key_of(place) + ".")]


def key_of(place: str) -> str:
    """A file's name within the history."""
    return hashlib.sha1(os.path.abspath(place).encode()).hexdigest()[:16]


def change(place: str, path: str, text: str, head: str, new: str) -> str:
    """Write a file and show its lines around the change."""
    write(place, encoded(place, text))
    first = max(1, len(lines_of(head)) + head.endswith(("\n", "\r")))
    lines = lines_of(text)
    last = min(len(lines), first + new.count("\n") + 3)
    return f"{path} has been changed:\n{numbered(lines, max(1, first - 3), last)}"


def numbered(lines: list[str], first: int, last: int) -> str:
    """Lines with their numbers, as many as may be shown."""
    shown = []
    size = 0
    for number in range(first, last + 1):
        line = f"{number:6}\t{lines[number - 1]}"
        size += len(line) + 1
        if size > SHOWN:
            shown.append(f"... {len(lines)} lines in all; ask for others with view_range")
            break
        shown.append(line)
    return "\n".join(shown)


def numbers(view_range: str, count: int) -> tuple[int, int]:
    """First and last line of a range such as ``[10, 20]``; -1 is the last line of the file."""
    found = [int(n) for n in re.findall(r"-?\d+", view_range)]
    if not found:
        return 1, count
    if len(found) != 2 or not 1 <= found[0] <= max(count, 1):
        raise ToolError(f"view_range={view_range}; give two line numbers, of 1 to {count}")
    last = count if found[1] == -1 else min(found[1], count)
    return found[0], last


def whole_number(text: str, name: str) -> int:
    """A number of the request."""
    try:
        return int(text)
    except ValueError:
        raise ToolError(f"{name}={text!r} is no whole number") from None


def list_folder(place: str, path: str) -> str:
    """What a folder holds, hidden names aside."""
    found = [path]
    for folder, folders, names in os.walk(place):
        level = os.path.relpath(folder, place).count(os.sep) + (folder != place)
        folders[:] = sorted(f for f in folders if f[0] != "." and f != "__pycache__")
        if level < DEPTH:
            found += [os.path.join(folder, n) for n in names if n[0] != "."]
            found += [os.path.join(folder, f) + "/" for f in folders]
        else:
            folders[:] = []
    return "\n".join(found[:1] + sorted(name for name in found[1:]))


def python_files(place: str) -> list[str]:
    """The Python files below a folder, sorted."""
    found = []
    for folder, folders, names in os.walk(place):
        folders[:] = sorted(f for f in folders if f[0] != "." and f != "__pycache__")
        found += [os.path.join(folder, name) for name in sorted(names) if name.endswith(".py")]
    return [name for name in found if os.path.isfile(name)]


TOOLS = {f.__name__: f for f in (view, create, str_replace, insert, undo_edit, search)}


def main() -> int:
    """Answer the request on standard input."""
    request = json.load(sys.stdin)
    try:
        code, text = 0, TOOLS[request.pop("tool")](**request)
    except (ToolError, TypeError) as error:
        code, text = 1, f"ERROR: {error}"
    except (OSError, MemoryError, RecursionError) as error:
        code, text = 1, f"ERROR: {type(error).__name__}: {error}"
    sys.stdout.buffer.write(re.sub("[\ud800-\udfff]", "\ufffd", text).encode() + b"\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
