"""Experts that know the fix: they look at what is to be changed, change it, and hand it in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from aem_lightning.envs.swe.bash import SUBMIT
from aem_lightning.envs.swe.instances import Instance
from aem_lightning.envs.swe.patches import TOKEN, TokenFix, hunks, token_fix
from aem_lightning.envs.swe.tools import write_call
from aem_lightning.envs.swe.words import FINISH, SWAPS, swap_action, view_action

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
    """Plays the words dialect: view the function that the statement names, mend it, finish.

    It takes back what others changed in between, so it recovers from slips.

    Raises:
        ValueError: The fix is not one token, or the statement names no function.
    """

    def __init__(self, instance: Instance) -> None:
        fix, symbol = words_fix(instance), named_symbol(instance)
        if fix is None or symbol is None:
            raise ValueError(
                f"{instance.instance_id}: its fix cannot be said in words; it needs "
                "datamodule.environment.dialect=functions"
            )
        self._fix, self._view = fix, view_action(symbol)
        self._now: dict[int, list[str]] = {}  # the tokens of each line, as last shown
        self._wanted: dict[int, list[str]] = {}  # as they have to be

    def act(self, observation: str, admissible: Sequence[str]) -> str:
        """The next action."""
        self._read(observation)
        if self._fix.line not in self._now:
            return self._view
        for number, now in self._now.items():
            pairs = zip(now, self._wanted[number], strict=True)
            wrong = [(old, new) for old, new in pairs if old != new]
            if wrong:
                mend = swap_action(number, *wrong[0])
                return mend if mend in admissible else self._view
        return FINISH

    def _read(self, observation: str) -> None:
        """Take in the lines that were shown; the first time, all but one are as they should be."""
        for line in observation.splitlines():
            head, _, text = line.partition(" ")
            if head.isdecimal():
                number, tokens = int(head), TOKEN.findall(text)
                self._now[number] = tokens
                mended = tokens
                if number == self._fix.line:
                    old, new = self._fix.old, self._fix.new
                    mended = [new if token == old else token for token in tokens]
                self._wanted.setdefault(number, mended)


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
