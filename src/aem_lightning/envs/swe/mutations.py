"""Bugs by mutation: one token of a function is replaced, and nothing else of the file changes."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

OPERATORS: Mapping[type[ast.AST], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "+"),
    ast.Mod: ("%", "//"),
    ast.FloorDiv: ("//", "%"),
}
CALLS = {"min": "max", "max": "min", "any": "all", "all": "any", "sorted": "list"}
LARGEST_CONSTANT = 10_000


@dataclass(frozen=True)
class Mutation:
    """A bug.

    Attributes:
        symbol: The function that has it, ``name`` or ``Class.name``.
        line: Its line, from 1.
        old: The right token.
        new: The wrong one.
        source: The whole file with the bug.
    """

    symbol: str
    line: int
    old: str
    new: str
    source: str


def mutations(source: str) -> Iterator[Mutation]:
    r"""Every bug that one replaced token makes, in the order of the source.

    Comparisons are moved by one or turned around, arithmetic, boolean operators and functions
    swapped, whole numbers raised by one.

    Example:
        >>> [(m.symbol, m.old, m.new) for m in mutations("def f(a):\n    return a < 1\n")]
        [('f', '<', '<='), ('f', '1', '2')]
    """
    text = _Text(source)
    for symbol, function in functions(ast.parse(source)):
        for node in sorted(ast.walk(function), key=_place):
            for start, end, old, new in _replacements(node, text):
                if source.count(old, start, end) == 1:
                    at = source.index(old, start, end)
                    wrong = source[:at] + new + source[at + len(old) :]
                    yield Mutation(symbol, source.count("\n", 0, at) + 1, old, new, wrong)


class _Text:
    """A source by character positions; the parser counts bytes, which are the same in ASCII."""

    def __init__(self, source: str) -> None:
        if not source.isascii():
            raise ValueError("mutations: the source holds characters beyond ASCII")
        self._starts = [0, *accumulate(map(len, source.splitlines(keepends=True)))]

    def start(self, node: ast.expr | ast.stmt) -> int:
        return self._starts[node.lineno - 1] + node.col_offset

    def end(self, node: ast.expr | ast.stmt) -> int:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self._starts[node.end_lineno - 1] + node.end_col_offset


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """The functions of a module by their names, ``name`` or ``Class.name``."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    yield f"{node.name}.{inner.name}", inner


def _place(node: ast.AST) -> tuple[int, int]:
    return getattr(node, "lineno", 0), getattr(node, "col_offset", 0)


def _replacements(node: ast.AST, text: _Text) -> Iterator[tuple[int, int, str, str]]:
    """Ranges of the source, a token inside, and what to put in its place."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in OPERATORS:
        span = text.end(node.left), text.start(node.comparators[0])
        yield *span, *OPERATORS[type(node.ops[0])]
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield text.end(node.left), text.start(node.right), *OPERATORS[type(node.op)]
    elif isinstance(node, ast.AugAssign) and type(node.op) in (ast.Add, ast.Sub):
        old, new = OPERATORS[type(node.op)]
        yield text.end(node.target), text.start(node.value), f"{old}=", f"{new}="
    elif isinstance(node, ast.BoolOp):
        pair = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        yield text.end(node.values[0]), text.start(node.values[1]), *pair
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        if node.value < LARGEST_CONSTANT:
            span = text.start(node), text.end(node)
            yield *span, str(node.value), str(node.value + 1)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
        yield text.start(node.func), text.end(node.func), node.func.id, CALLS[node.func.id]
