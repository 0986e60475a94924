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
        self._first: dict[int, list[str]] = {}  # the tokens of each line, as first shown
        self._now: dict[int, list[str]] = {}  # as last shown
        self._own: set[int] = set()  # the lines of the function
        self._useless: set[str] = set()  # edits that did not help
        self._tested = False  # what is there now

    def act(self, observation: str, admissible: Sequence[str]) -> str:
        """The next action."""
        is_view = self._read(observation)
        changes = self._changes()
        if observation == HOLDS:
            return FINISH
        if observation == FAILS:
            self._tested = True
            if len(changes) == 1:
                self._useless.add(swap_action(*changes[0]))
        if not self._own:
            return self._view
        if changes and not self._tested:
            return TEST
        if changes:
            back = [swap_action(line, new, old) for line, old, new in changes]
            return next((edit for edit in back if edit in admissible), UNDO)
        untried = self._untried(admissible)
        if not untried and not is_view:  # another function may be in view
            return self._view
        return untried[0] if untried else FINISH

    def _untried(self, admissible: Sequence[str]) -> list[str]:
        """The edits of the function that can be made and did not fail, in a random order."""
        edits = [a.split() for a in sorted(admissible) if a.startswith("edit ")]
        own = [" ".join(edit) for edit in edits if int(edit[1]) in self._own]
        untried = [edit for edit in own if edit not in self._useless]
        self._rng.shuffle(untried)
        return untried

    def _changes(self) -> list[tuple[int, str, str]]:
        """The tokens that are not as they were first shown: line, then and now."""
        return [
            (line, old, new)
            for line in sorted(self._now)
            for old, new in zip(self._first[line], self._now[line], strict=True)
            if old != new
        ]

    def _read(self, observation: str) -> bool:
        """Take in the lines that were shown; whether they are the function."""
        shown: dict[int, list[str]] = {}
        for line in observation.splitlines():
            head, _, text = line.partition(" ")
            if head.isdecimal():
                shown[int(head)] = TOKEN.findall(text)
        for number, tokens in shown.items():
            self._tested &= tokens == self._now.get(number, tokens)
            self._now[number] = tokens
            self._first.setdefault(number, tokens)
        is_view = len(shown) > 1 and any(ts[:2] == self._head for ts in shown.values())
        self._own = {*shown} if is_view else self._own
        return is_view


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
