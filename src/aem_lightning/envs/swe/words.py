"""A way to play in words alone: look at a function, put one token in the place of another, finish.

For small policies, which do not learn to write calls and indented code. What can be said is listed,
so actions are admissible or not.
"""

from __future__ import annotations

import re

from aem_lightning.envs.swe.patches import TOKEN
from aem_lightning.envs.swe.tools import Call, CallError

NUMBERED = re.compile(r"^ *(\d+)\t(.*)$")
FINISH = "finish"
# What a token may become: the opposites of the usual mistakes.
SWAPS = {
    **{"<": ("<=",), "<=": ("<",), ">": (">=",), ">=": (">",), "==": ("!=",), "!=": ("==",)},
    **{"+": ("-", "*"), "-": ("+",), "*": ("+",), "%": ("//",), "//": ("%",)},
    **{"+=": ("-=",), "-=": ("+=",), "and": ("or",), "or": ("and",), "list": ("sorted",)},
    **{"min": ("max",), "max": ("min",), "any": ("all",), "all": ("any",)},
}


class WordsDialect:
    """Reads actions of one episode; ``symbols`` can be viewed, the one in view can be edited."""

    def __init__(self, symbols: tuple[str, ...]) -> None:
        self._views = {view_action(name): Call("symbol", {"name": name}) for name in symbols}
        self._swaps: dict[str, Call] = {}
        self._path = ""
        self._lines: dict[int, str] = {}

    @property
    def admissible(self) -> tuple[str, ...]:
        """Every action that is accepted now, sorted."""
        return tuple(sorted([*self._views, *self._swaps, FINISH]))

    def parse(self, action: str) -> Call:
        """The call that an action stands for.

        Raises:
            CallError: It is not admissible.
        """
        said = spoken(action)
        if said == FINISH:
            return Call("finish")
        call = self._views.get(said) or self._swaps.get(said)
        if call is None:
            raise CallError("nothing happens .")
        return call

    def read(self, call: Call, output: str) -> str:
        """Take in what a call gave; what the agent reads of it."""
        if call.tool == "symbol":
            self._path, _, output = output.partition("\n")
            self._lines = {}
        for line in output.splitlines():
            if found := NUMBERED.match(line):
                self._lines[int(found[1])] = found[2]
        self._swaps = {
            swap_action(number, old, new): Call(
                "swap", {"path": self._path, "line": str(number), "old": old, "new": new}
            )
            for number, line in self._lines.items()
            for old, new in swaps(line)
        }
        return "\n".join(line.strip().replace("\t", " ") for line in output.splitlines())


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
