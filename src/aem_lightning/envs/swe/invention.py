"""Libraries made up at random: small functions that nobody knows, with tests that find each bug.

The project's own libraries have eighty functions: a policy from nothing learns those, and what it
learns of one bug of a function is wrong for the next. Here no function comes twice, so what carries
over is how to look for a bug.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from aem_lightning.envs.swe.libraries import Library
from aem_lightning.envs.swe.mutations import mutations

PACKAGE = "sums"  # all are versions of one
FUNCTIONS = 8  # of a library
CALLS = 3  # in a test
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
    cores, tests, names = [], [], rng.sample(NAMES, FUNCTIONS)
    for name in names:
        core, test = next(_functions(name, rng))
        cores.append(core)
        tests.append(test)
    imported = f"from {PACKAGE} import {', '.join(sorted(names))}\n"
    core = "\n\n".join(['"""Small sums."""\n', *cores])
    return Library(PACKAGE, core, "\n\n".join([imported, *tests]))


def _functions(name: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Functions of that name and their tests, for ever."""
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
        indented = "".join(f"    {line}\n" for line in body.splitlines())
        core = f"def {name}({given}):\n{indented}"
        if calls := _telling_calls(name, core, rng, of_lists):
            checks = "".join(f"    assert {call} == {answer!r}\n" for call, answer in calls)
            yield core, f"def test_{name}():\n{checks}"


def _telling_calls(
    name: str, core: str, rng: random.Random, of_lists: bool
) -> list[tuple[str, Any]] | None:
    """Calls with their answers of which each bug changes one; ``None`` where none were found."""
    right = _made(core, name)
    wrong = [_made(bug.source, name) for bug in mutations(core)]
    chosen: list[tuple[str, Any]] = []
    for _ in range(60):
        if len(chosen) == CALLS and not wrong:
            return chosen
        numbers = [rng.randrange(10) for _ in range(rng.randint(4, 5) if of_lists else 2)]
        given = [numbers] if of_lists else numbers
        answer = _answer(right, given)
        left = [bug for bug in wrong if _answer(bug, given) == answer]
        room = CALLS - len(chosen)
        if isinstance(answer, Exception) or room == 0 or (len(left) == len(wrong) and wrong):
            continue
        if left and room == 1:
            continue  # the last call has to tell all that are left
        chosen.append((f"{name}({', '.join(map(repr, given))})", answer))
        wrong = left
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
