"""Experts: two that know the fix, make the change and hand it in, and one that tries changes."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

from aem_lightning.envs.swe.bash import SUBMIT
from aem_lightning.envs.swe.instances import Instance
from aem_lightning.envs.swe.patches import TOKEN, TokenFix, hunks, token_fix
from aem_lightning.envs.swe.tools import write_call
from aem_lightning.envs.swe.words import (
    FAILS,
    FINISH,
    HOLDS,
    SWAPS,
    TEST,
    UNDO,
    reported_case,
    swap_action,
    view_action,
)

DELIMITER = "END_OF_PATCH"
SWAPPED = {*SWAPS, *(new for others in SWAPS.values() for new in others)}
NAMED = re.compile(r"`(?:\w+\.)?([\w.]+)`")


class FunctionsExpert:
    """Plays the gold patch in calls: search, view, and an edit for every part of the patch.

    Raises:
        ValueError: The instance has no patch.
    """

    def __init__(self, instance: Instance) -> None:
        _need_patch(instance)
        self._calls = _calls(instance)

    def act(self, observation: str, admissible: Sequence[str]) -> str:
        """The next call, whatever the observation says."""
        return next(self._calls, write_call("finish", command="submit"))


class BashExpert:
    """Plays the gold patch in blocks of bash: shows what it changes, applies it, hands it in.

    Raises:
        ValueError: The instance has no patch.
    """

    def __init__(self, instance: Instance) -> None:
        _need_patch(instance)
        patch = f"<<'{DELIMITER}'\n{instance.patch.rstrip()}\n{DELIMITER}"
        self._commands = iter((f"git apply --stat {patch}", f"git apply {patch}"))

    def act(self, observation: str, admissible: Sequence[str]) -> str:
        """The next block, whatever the observation says."""
        return f"```bash\n{next(self._commands, f'echo {SUBMIT}')}\n```"


class WordsExpert:
    """Plays the words dialect without knowing the fix, as one who reads no code would.

    It looks at the function that the statement names and makes one edit after the other, in a
    random order; after each it runs the reported case, and takes back what did not help: by the
    opposite edit, so that who imitates it has to read what a line says now. It recovers from slips.

    Args:
        instance: The instance.
        seed: Of the order.

    Raises:
        ValueError: The statement names no function, or no case that should hold.
    """

    def __init__(self, instance: Instance, seed: int = 0) -> None:
        symbol = named_symbol(instance)
        if symbol is None or not reported_case(instance):
            raise ValueError(
                f"{instance.instance_id}: its statement names no function and no case to try; it "
                "needs datamodule.environment.dialect=functions"
            )
        self._view = view_action(symbol)
        self._head = ["def", symbol.rpartition(".")[2]]
        self._rng = random.Random(seed)
        self._in_view = ""  # the function that lines are of, without what edits change
        self._own: str | None = None  # the one to mend, once it was seen
        self._first: dict[tuple[str, int], list[str]] = {}  # the tokens of a line, as first shown
        self._now: dict[tuple[str, int], list[str]] = {}  # as last shown
        self._useless: set[str] = set()  # edits that did not help
        self._tested = False  # what is there now

    def act(self, observation: str, admissible: Sequence[str]) -> str:
        """The next action."""
        self._read(observation)
        changes = self._changes()
        if observation == HOLDS:
            return FINISH
        if observation == FAILS:
            self._tested = True
            if len(changes) == 1 and changes[0][0] == self._own:
                self._useless.add(swap_action(*changes[0][1:]))
        if self._own is None:
            return self._view
        if any(function != self._in_view for function, *_ in changes):
            return UNDO  # until nothing is left of it
        if changes and not self._tested:
            return TEST
        if changes:
            back = [swap_action(line, new, old) for _, line, old, new in changes]
            return back[0] if {*back} <= {*admissible} else UNDO
        if self._in_view != self._own:
            return self._view
        untried = [a for a in sorted(admissible) if a.startswith("edit ")]
        untried = [edit for edit in untried if edit not in self._useless]
        return self._rng.choice(untried) if untried else FINISH

    def _changes(self) -> list[tuple[str, int, str, str]]:
        """The tokens that are not as they were first shown: function, line, then and now."""
        return [
            (*place, old, new)
            for place in sorted(self._now)
            for old, new in zip(self._first[place], self._now[place], strict=True)
            if old != new
        ]

    def _read(self, observation: str) -> None:
        """Take in the lines that were shown."""
        heads = [line.partition(" ") for line in observation.splitlines()]
        shown = {int(head): TOKEN.findall(text) for head, _, text in heads if head.isdecimal()}
        kept = "\n".join(
            " ".join("_" if token.isdecimal() or token in SWAPPED else token for token in tokens)
            for tokens in shown.values()
        )
        if len(shown) > 1 or (1 in shown and not self._in_view.startswith(kept)):
            self._in_view = kept
            if shown.get(1, [])[:2] == self._head:
                self._own = self._in_view
        for number, tokens in shown.items():
            place = self._in_view, number
            self._tested &= tokens == self._now.get(place, tokens)
            self._now[place] = tokens
            self._first.setdefault(place, tokens)


def words_fix(instance: Instance) -> TokenFix | None:
    """The fix of an instance as the words dialect can say it, if it can."""
    fix = token_fix(instance.patch) if instance.patch else None
    if fix is None:
        return None
    if fix.old.isdecimal() and fix.new.isdecimal():
        return fix if abs(int(fix.old) - int(fix.new)) == 1 else None
    return fix if fix.new in SWAPS.get(fix.old, ()) else None


def named_symbol(instance: Instance) -> str | None:
    """The function that an embedded instance's statement names."""
    found = NAMED.search(instance.problem_statement)
    return found[1] if found else None


def _calls(instance: Instance) -> Iterator[str]:
    symbol = named_symbol(instance)
    if symbol is not None:
        yield write_call("search", search_term=f"def {symbol.rpartition('.')[2]}")
    seen = ""
    for hunk in hunks(instance.patch):
        if hunk.path != seen:
            yield write_call("file_editor", command="view", path=f"/testbed/{hunk.path}")
            seen = hunk.path
        yield write_call(
            "file_editor",
            command="str_replace",
            path=f"/testbed/{hunk.path}",
            old_str=hunk.old,
            new_str=hunk.new,
        )


def _need_patch(instance: Instance) -> None:
    if not instance.patch:
        raise ValueError(
            f"{instance.instance_id} has no gold patch, so there is no expert play of it. "
            "Warm-start on embedded instances: datamodule=swe_embedded"
        )
