"""Libraries made up at random: small functions that nobody knows, with tests that find each bug.

The project's own libraries have eighty functions: a policy from nothing learns those, and what it
learns of one bug of a function is wrong for the next. Here no function comes twice, so what carries
over is how to look for a bug.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from textwrap import indent
from typing import Any

from aem_lightning.envs.swe.libraries import Library
from aem_lightning.envs.swe.mutations import mutations

PACKAGE = "sums"  # all are versions of one
FUNCTIONS = 8  # of a library
CALLS = 3  # in a test
TRIES = 60  # of calls, before another function is made up
# fmt: off
NAMES = (
    "area", "bill", "bonus", "cost", "count", "debt", "depth", "dose", "error", "fare", "fee",
    "gain", "grade", "heat", "height", "limit", "load", "loss", "mark", "mass", "measure", "offer",
    "order", "pay", "phase", "pitch", "point", "price", "rate", "reach", "reading", "rent", "score",
    "share", "size", "slope", "speed", "stake", "stock", "sum", "tally", "tax", "term", "toll",
    "volume", "wage", "weight",
)
# fmt: on
VALUES = ("a", "b", "low", "high", "left", "right", "start", "step", "width", "x", "y")
OPERATORS = ("+", "-", "*", "%", "//")
COMPARISONS = ("<", "<=", ">", ">=", "==", "!=")
# Bodies: of lists, and of two numbers. What stands in braces is drawn anew for each function.
LISTS = (
    "total = {k}\nfor item in items:\n    if item {c} {m}:\n        total {s} item\nreturn total",
    "found = []\nfor item in items:\n    if item {c} {k} {j} item {d} {m}:\n"
    "        found.append(item {o} {n})\nreturn found",
    "seen = 0\nfor item in items:\n    seen {s} item {c} {k}\nreturn seen {o} {m}",
    "return [item {o} {k} for item in items if item {c} {m}]",
    "best = {e}(items)\nreturn best {o} {k}",
    "return {q}(item {c} {k} for item in items)",
    "ranked = sorted(items)\nreturn ranked[{k}:]",
    "first = items[{k}]\nlast = items[{m}]\nreturn first {o} last",
    "kept = [item for item in items if item {c} {k}]\nreturn len(kept) {o} {m}",
)
NUMBERS = (
    "return {v} {o} {k} {p} {w}",
    "if {v} {c} {w}:\n    return {v} {o} {k}\nreturn {w} {p} {m}",
    "best = {e}({v}, {w})\nreturn best {o} {k}",
    "return {v} {c} {k} {j} {w} {d} {m}",
    "if {v} {c} {k}:\n    return {w} {o} {m}\nreturn {w}",
    "part = {v} {o} {k}\nif part {c} {w}:\n    part {s} {m}\nreturn part {p} {w}",
    "whole = {v} {o} {w}\nreturn {e}(whole, {k})",
)


def invent(seed: int, number: int) -> Library:
    """The ``number``-th library that ``seed`` stands for; equal arguments give equal ones.

    Each test calls one function and fails for every bug of it that `mutations` makes.
    """
    rng = random.Random(f"{seed}/{number}")
    names = rng.sample(NAMES, FUNCTIONS)
    cores, tests = zip(*(_function(name, rng) for name in names), strict=True)
    imported = f"from {PACKAGE} import {', '.join(sorted(names))}\n"
    core = "\n\n".join(['"""Small sums."""\n', *cores])
    return Library(PACKAGE, core, "\n\n".join([imported, *tests]))


def _function(name: str, rng: random.Random) -> tuple[str, str]:
    """A function of that name, and its test."""
    while True:
        of_lists = rng.random() < len(LISTS) / (len(LISTS) + len(NUMBERS))
        first, second = rng.sample(VALUES, 2)
        body = rng.choice(LISTS if of_lists else NUMBERS).format(
            v=first,
            w=second,
            **dict(zip("kmn", map(str, rng.choices(range(8), k=3)), strict=True)),
            **dict(zip("op", rng.sample(OPERATORS, 2), strict=True)),
            **dict(zip("cd", rng.sample(COMPARISONS, 2), strict=True)),
            e=rng.choice(("min", "max")),
            q=rng.choice(("any", "all")),
            j=rng.choice(("and", "or")),
            s=rng.choice(("+=", "-=")),
        )
        given = "items" if of_lists else f"{first}, {second}"
        core = f"def {name}({given}):\n{indent(body, '    ')}\n"
        if calls := _telling_calls(name, core, rng, of_lists):
            checks = "".join(f"    assert {call} == {answer!r}\n" for call, answer in calls)
            return core, f"def test_{name}():\n{checks}"


def _telling_calls(
    name: str, core: str, rng: random.Random, of_lists: bool
) -> list[tuple[str, Any]] | None:
    """Calls with their answers of which each bug changes one; ``None`` where none were found."""
    right = _made(core, name)
    hidden = [_made(bug.source, name) for bug in mutations(core)]  # bugs that no call tells
    chosen: list[tuple[str, Any]] = []
    for _ in range(TRIES):
        numbers = [rng.randrange(10) for _ in range(rng.randint(4, 5) if of_lists else 2)]
        given = [numbers] if of_lists else numbers
        answer = _answer(right, given)
        left = [bug for bug in hidden if _answer(bug, given) == answer]
        is_useless = len(left) == len(hidden) > 0
        has_to_tell_all = len(chosen) == CALLS - 1
        if isinstance(answer, Exception) or is_useless or (has_to_tell_all and left):
            continue
        chosen.append((f"{name}({', '.join(map(repr, given))})", answer))
        hidden = left
        if len(chosen) == CALLS:
            return chosen
    return None


def _made(core: str, name: str) -> Callable[..., Any]:
    """The function that a source of ours defines."""
    space: dict[str, Any] = {}
    exec(core, space)
    made: Callable[..., Any] = space[name]
    return made


def _answer(function: Callable[..., Any], given: list[Any]) -> Any:
    """What it returns, or the kind of error that it raises: that differs from every answer."""
    try:
        return function(*given)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        return error
