"""A way to play in words alone: look at a function, change a token, run the case, finish.

For small policies, which do not learn to write calls and indented code. What can be said is listed,
so actions are admissible or not.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Hashable
from textwrap import dedent

from aem_lightning.envs.swe.instances import Instance
from aem_lightning.envs.swe.patches import TOKEN
from aem_lightning.envs.swe.sandbox import CommandResult
from aem_lightning.envs.swe.tools import Call, CallError

NUMBERED = re.compile(r"^ *(\d+)\t(.*)$", re.MULTILINE)
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
    """Reads actions of one episode.

    Args:
        symbols: The functions that can be viewed; the one in view can be edited.
        case: The command by which ``test`` runs what was reported; "" where nothing was.
    """

    def __init__(self, symbols: tuple[str, ...], case: str = "") -> None:
        self._case = Call("execute_bash", {"cmd": case}) if case else None
        self._views = {view_action(name): Call("symbol", {"name": name}) for name in symbols}
        self._swaps: dict[str, Call] = {}
        self._path = ""
        self._lines: dict[int, str] = {}
        self._edits: list[tuple[str, int, str, str]] = []  # file, line, text before and after

    @property
    def admissible(self) -> tuple[str, ...]:
        """Every action that is accepted now, sorted."""
        more = [*([TEST] if self._case else []), *([UNDO] if self._edits else []), FINISH]
        return tuple(sorted([*self._views, *self._swaps, *more]))

    @property
    def state(self) -> Hashable:
        """What every answer from now on hangs on."""
        return self._path, tuple(self._lines.items()), tuple(self._edits)

    def parse(self, action: str) -> Call:
        """The call that an action stands for.

        Raises:
            CallError: It is not admissible.
        """
        said = spoken(action)
        if said == FINISH:
            return Call("finish")
        call = self._views.get(said) or self._swaps.get(said)
        call = self._case if said == TEST else call
        if said == UNDO and self._edits:
            call = Call("undo_edit", {"path": self._edits[-1][0]})
        if call is None:
            raise CallError("nothing happens .")
        return call

    def read(self, call: Call, result: CommandResult) -> str:
        """Take in what a call gave; what the agent reads of it."""
        if call is self._case:
            return FAILS if result.code else HOLDS
        output = result.output
        if call.tool == "symbol":
            self._path, _, output = output.partition("\n")
            self._lines = {}
        if call.tool == "undo_edit" and result.code == 0:
            path, line, before, _ = self._edits.pop()
            output = f"{line}\t{before}"
            if path == self._path and line in self._lines:  # else it is out of view
                self._lines[line] = before
        elif call.tool in ("symbol", "swap"):
            for number, text in NUMBERED.findall(output):
                if call.tool == "swap":
                    self._edits.append((self._path, int(number), self._lines[int(number)], text))
                self._lines[int(number)] = text
        self._swaps = {
            swap_action(number, old, new): Call(
                "swap", {"path": self._path, "line": str(number), "old": old, "new": new}
            )
            for number, line in self._lines.items()
            for old, new in swaps(line)
        }
        return "\n".join(line.strip().replace("\t", " ") for line in output.splitlines())


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
