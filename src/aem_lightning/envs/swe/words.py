"""A way to play in words alone: look at a function, change a token, run the case, finish.

For small policies, which do not learn to write calls and indented code. What can be said is listed,
so actions are admissible or not. Looking and editing run no code and need no sandbox.
"""

from __future__ import annotations

import ast
import io
import shlex
import tarfile
from collections.abc import Hashable, Iterator
from textwrap import dedent

from aem_lightning.envs.swe.instances import Instance
from aem_lightning.envs.swe.mutations import functions
from aem_lightning.envs.swe.patches import TOKEN, make_diff
from aem_lightning.envs.swe.tools import CallError

REPORTED, WANTED = "This should hold, and does not:", "Find the defect"  # of statements
FINISH, TEST, UNDO = "finish", "test", "undo"
HOLDS, FAILS = "the case holds .", "the case fails ."
CASE_S = 10  # seconds for it
# What a token may become: the opposites of the usual mistakes.
SWAPS = {
    **{"<": ("<=",), "<=": ("<",), ">": (">=",), ">=": (">",), "==": ("!=",), "!=": ("==",)},
    **{"+": ("-", "*"), "-": ("+",), "*": ("+",), "%": ("//",), "//": ("%",)},
    **{"+=": ("-=",), "-=": ("+=",), "and": ("or",), "or": ("and",), "list": ("sorted",)},
    **{"min": ("max",), "max": ("min",), "any": ("all",), "all": ("any",)},
}


class WordsDialect:
    """One episode in words: what is in view, and what was edited; no code is run here.

    Args:
        files: The base tree, as a tar archive. Its functions can be viewed, those of tests aside;
            the one in view can be edited. Its lines are counted from its first, which is 1.
        case: The command by which `TEST` runs what was reported; "" where nothing was.
    """

    def __init__(self, files: bytes, case: str) -> None:
        self.case = case
        self._base = {path: text.splitlines(keepends=True) for path, text in _sources(files)}
        self._now = {path: [*lines] for path, lines in self._base.items()}
        self._views: dict[str, tuple[str, range]] = {}
        for path, lines in self._base.items():
            for name, node in functions(ast.parse("".join(lines))):
                place = path, range(node.lineno, (node.end_lineno or node.lineno) + 1)
                self._views.setdefault(view_action(name), place)
        self._in_view: tuple[str, range] = "", range(0)
        # The view that an edit was made in, the line, and its text before and after.
        self._edits: list[tuple[tuple[str, range], int, str, str]] = []
        self._touched: set[str] = set()

    @property
    def admissible(self) -> tuple[str, ...]:
        """Every action that is accepted now, sorted."""
        more = [*([TEST] if self.case else []), *([UNDO] if self._edits else []), FINISH]
        return tuple(sorted({*self._views, *self._swaps(), *more}))

    @property
    def state(self) -> Hashable:
        """What every answer from now on hangs on."""
        return self._in_view, tuple(self._edits)

    @property
    def changed(self) -> dict[str, str]:
        """The files that are not as they were."""
        return {p: "".join(lines) for p, lines in self._now.items() if lines != self._base[p]}

    @property
    def touched(self) -> dict[str, str]:
        """The files that an edit was ever made in, as they are now."""
        return {path: "".join(self._now[path]) for path in sorted(self._touched)}

    @property
    def diff(self) -> str:
        """The change, as git writes it."""
        return "".join(
            make_diff(p, "".join(self._base[p]), text) for p, text in self.changed.items()
        )

    def act(self, said: str) -> str:
        """The answer to a view, an edit or an undo.

        Raises:
            CallError: It is none that is admissible.
        """
        if said in self._views:
            self._in_view = self._views[said]
            return self._shown(self._in_view[1])
        if said == UNDO and self._edits:
            view, number, text, _ = self._edits.pop()
        elif swap := self._swaps().get(said):
            view, (number, text) = self._in_view, swap
            if self._edits and self._edits[-1][:3] == (view, *swap):  # the opposite of the last one
                self._edits.pop()
            else:
                self._edits.append((view, number, self._now[view[0]][number - 1], text))
        else:
            raise CallError("nothing happens .")
        path, lines = view
        self._now[path][number - 1] = text
        self._touched.add(path)
        if view != self._in_view:  # undone: it comes into view
            self._in_view = view
            return self._shown(lines)
        return self._shown(range(number, number + 1))

    def _shown(self, numbers: range) -> str:
        """Lines of what is in view."""
        path, lines = self._in_view
        shown = [(n - lines.start + 1, self._now[path][n - 1].rstrip()) for n in numbers]
        return "\n".join(f"{number} {text}".rstrip() for number, text in shown)

    def _swaps(self) -> dict[str, tuple[int, str]]:
        """What can be edited: the line of the file and its new text, by the action."""
        path, numbers = self._in_view
        found = {}
        for number in numbers:
            line = self._now[path][number - 1]
            for old, new in swaps(line):
                at = next(m.start() for m in TOKEN.finditer(line) if m.group() == old)
                text = line[:at] + new + line[at + len(old) :]
                found[swap_action(number - numbers.start + 1, old, new)] = number, text
        return found


def _sources(files: bytes) -> Iterator[tuple[str, str]]:
    """The Python files of an archive that are no tests, sorted by their paths."""
    with tarfile.open(fileobj=io.BytesIO(files)) as tar:
        for member in sorted(tar, key=lambda each: each.name):
            name = member.name.rpartition("/")[2]
            if member.isfile() and name.endswith(".py") and not name.startswith("test"):
                content = tar.extractfile(member)
                assert content is not None
                yield member.name, content.read().decode()


def reported_case(instance: Instance) -> str:
    """The code that an embedded instance's statement says should hold; "" where there is none."""
    _, _, rest = instance.problem_statement.partition(f"{REPORTED}\n\n")
    return dedent(rest.partition(f"\n\n{WANTED}")[0]).strip()


def case_command(instance: Instance) -> str:
    """How to run `reported_case`; "" where there is none."""
    case = reported_case(instance)
    if not case or not instance.fail_to_pass:
        return ""
    tests = instance.fail_to_pass[0].partition("::")[0]  # what stands above the first one is needed
    script = f"exec(open({tests!r}).read().partition('\\ndef test_')[0])\n{case}"
    # The order of a set of words would else be another each time.
    return f"PYTHONHASHSEED=0 timeout {CASE_S} python3 -B -c {shlex.quote(script)}"


def view_action(symbol: str) -> str:
    """How one asks to see a function."""
    return spoken(f"view {symbol}")


def swap_action(line: int, old: str, new: str) -> str:
    """How one puts a token in the place of another."""
    return f"edit {line} {old} {new}"


def spoken(text: str) -> str:
    """A text in words: lower case, a blank between any two tokens."""
    return " ".join(TOKEN.findall(text.lower()))


def swaps(line: str) -> list[tuple[str, str]]:
    """What a line can become by one token, of those that occur in it once.

    Example:
        >>> swaps("if low <= 1:")
        [('<=', '<'), ('1', '0'), ('1', '2')]
    """
    tokens = TOKEN.findall(line)
    once = [token for token in tokens if tokens.count(token) == 1]
    return [(token, other) for token in once for other in _others(token)]


def _others(token: str) -> tuple[str, ...]:
    if token.isdecimal():
        number = int(token)
        return tuple(str(n) for n in (number - 1, number + 1) if n >= 0)
    return SWAPS.get(token, ())
