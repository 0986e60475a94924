"""Whether a change resolves an instance: its tests decide, in a sandbox the agent never saw."""

from __future__ import annotations

import ast
import hashlib
import re
import secrets
import shlex
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from importlib.resources import files as files_of

from aem_lightning.envs.answers import printable
from aem_lightning.envs.swe.changes import DiffError, diff_text, file_changes, text_of
from aem_lightning.envs.swe.instances import Instance
from aem_lightning.envs.swe.sandbox import CommandResult, Limits, Sandbox, Session, SessionSpec
from aem_lightning.envs.swe.tamper import is_script, is_test, tampering, without_tests
from aem_lightning.envs.swe.worktree import apply

PYTHON = '"$(command -v python || command -v python3)"'  # images may lack the former

GRADE_S = 300.0
OUTPUT_BYTES = 4 << 20  # runners that list every test write more than an agent is shown
JUDGE = files_of("aem_lightning.envs.swe").joinpath("judge.py").read_text(encoding="utf-8")
JUDGE_MARK = "aem-judge"
REPORT_CHARACTERS = 4_000
REASON_CHARACTERS = 300
RUNNERS = ("pytest-dev/pytest", "pytest-dev/pluggy")  # whose fixes are changes of the runner
PYTEST_HINT = "pip install 'aem-lightning[swe]' beside the trainer, or take an image that has it"
FAILURES = frozenset({"FAILED", "ERROR"})
_SKIPPED = "SKIPPED"
_PASSED, _KEPT = ("PASSED", "XFAIL"), ("PASSED", "XFAIL", _SKIPPED)
_SUMMARY = re.compile(r"^=+ short test summary info =+$", re.MULTILINE)
_LINE = re.compile(r"^(PASSED|FAILED|ERROR|XFAIL|XPASS) (.+)$", re.MULTILINE)
_SKIPPED_LINE = re.compile(r"^(\S+::.+?) SKIPPED\b.*$", re.MULTILINE)


@dataclass(frozen=True)
class Grade:
    """What came out.

    Attributes:
        resolved: Every test that has to pass does, and nothing was tampered with.
        statuses: What pytest said of each test, by its id.
        tampered: What a change did that no fix needs, in words.
        infra_error: What broke outside the agent's doing: the grade says nothing then.
        report: The end of what the tests wrote, or why they were not run.
        why: What was wrong with the statuses.
        left_out: Parts of the change that were not graded though they may be code, in words.
    """

    resolved: bool = False
    statuses: Mapping[str, str] = field(default_factory=dict)
    tampered: tuple[str, ...] = ()
    infra_error: str | None = None
    report: str = ""
    why: str = ""
    left_out: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        """Why it is no success, in a few words for people; empty for one."""
        if self.resolved:
            return ""
        parts = [self.why or self.infra_error or self.report.strip()[:REASON_CHARACTERS]]
        parts += [f"not graded: {', '.join(self.left_out)}"] if self.left_out else []
        return printable("; ".join(parts))


def grade(
    sandbox: Sandbox,
    instance: Instance,
    base: bytes,
    diff: str | bytes,
    spec: SessionSpec | None = None,
) -> Grade:
    """Apply its test patch to the base tree of an instance, then a change, and run the tests.

    The session is a new one, so nothing but ``diff`` comes from the agent's. Changes to tests, and
    to files of the test patch, are left out. The interpreter keeps the working folder off its start
    path, and pytest reads no configuration, and of a ``conftest.py`` the fixtures alone: what a
    repository says about the runner does not reach it. Product code that patches the runner *while
    it is tested* could still pass; `tampering` looks for that.

    Args:
        sandbox: Where.
        instance: What the change is for.
        base: Archive of the base tree; empty where ``spec.image`` has it.
        diff: The agent's change, as ``git diff`` prints it.
        spec: Of the session; its limit of time is the tests'.
    """
    spec = spec or SessionSpec(limits=Limits().ended_by_the_clock(GRADE_S))
    change = graded_change(instance, diff)
    if isinstance(change, Grade):
        return change
    with closing(sandbox.open(spec)) as session:
        found = _graded(session, instance, base, change.diff, spec.limits.wall_s)
    return replace(found, left_out=change.left_out)


@dataclass(frozen=True)
class GradedChange:
    """What of a change is graded, as a diff; in words what else of it might have been code."""

    diff: str
    left_out: tuple[str, ...] = ()


def graded_change(
    instance: Instance, diff: str | bytes, left_out: re.Pattern[str] | None = None
) -> GradedChange | Grade:
    """What of an agent's change is graded; a grade where it tampers, whose tests are not run.

    What is left out is not looked at: it reaches no test. A fix of a runner may look so.
    """
    text = diff_text(diff)
    spared = instance.repo in RUNNERS
    try:
        parts = file_changes(text)
    except DiffError as error:
        return Grade(tampered=(str(error),), report=f"not run: {error}")
    scripts = [] if spared else [part for part in parts if is_script(part)]
    kept = without_tests(
        text_of(part for part in parts if part not in scripts), instance.test_patch, left_out
    )
    tampered = () if spared else tampering(kept)
    if tampered:
        return Grade(tampered=tampered, report="not run: " + "; ".join(tampered))
    named = [f"{p.paths[-1]}, which names a test runner" for p in scripts if not is_test(p)]
    return GradedChange(kept, tuple(map(printable, named)))


def _graded(session: Session, instance: Instance, base: bytes, diff: str, wall_s: float) -> Grade:
    if base:
        unpacked = session.put_tar(base)
        if unpacked.code:
            return broken(unpacked, "the base tree cannot be unpacked")
    elif instance.setup_patch:
        done = apply(session, instance.setup_patch)
        if done.code:
            return broken(done, "the bug cannot be put into the image")
    # Tests first: where they do not fit the base, that is never the agent's doing.
    if instance.test_patch.strip():
        patched = apply(session, instance.test_patch)
        if patched.code:
            return broken(patched, "the test patch does not apply")
    ended = apply_change(session, diff)
    if ended is not None:
        return ended
    expected = [*instance.fail_to_pass, *instance.pass_to_pass]
    changed: tuple[str, ...] = ()
    if instance.image:
        result = session.run(image_command(expected))
        statuses = parse_statuses(result.output)
    else:
        result, statuses, changed = run_judged(session, expected)
    if result.infra_error:
        return broken(result, "")
    if result.timed_out:
        return too_slow(result, wall_s)
    if changed:
        why = f"changed while the tests ran: {', '.join(changed[:3])}"
        return Grade(False, statuses, changed, report=result.output[-REPORT_CHARACTERS:], why=why)
    if not statuses:
        # Away from the working folder and the home: an agent cannot choose to be told apart.
        there = session.run(f"{PYTHON} -s -c 'import pytest'", cwd="/", wall_s=60)
        if there.code:
            return broken(there, f"no pytest inside the sandbox: {PYTEST_HINT}")
    return decided(result, statuses, instance)


def apply_change(session: Session, diff: str) -> Grade | None:
    """Apply what is graded of an agent's change; the grade, where that ends it."""
    if not diff.strip():
        return None
    applied = apply(session, diff)
    if applied.infra_error:
        return broken(applied, "")
    if applied.code:
        return Grade(report=f"the change does not apply: {applied.output[-500:]}")
    return None


def broken(result: CommandResult, what: str) -> Grade:
    """The grade that says nothing, as something else than the change broke."""
    why = result.infra_error or f"{what}: {result.output.strip()[-500:]}"
    return Grade(infra_error=why, report=why)


def too_slow(result: CommandResult, wall_s: float) -> Grade:
    """The grade of tests that did not end."""
    return Grade(report=f"the tests took over {wall_s:g} s\n{result.output[-REPORT_CHARACTERS:]}")


def decided(result: CommandResult, statuses: Mapping[str, str], instance: Instance) -> Grade:
    """The grade of a run with these statuses; one that failed, and names no failure, is forged."""
    forged = result.code != 0 and FAILURES.isdisjoint(statuses.values())
    lost = lost_tests(statuses, instance.fail_to_pass, instance.pass_to_pass)
    report = result.output[-REPORT_CHARACTERS:]
    why = ""
    if not statuses:
        why = f"no test was run: {report.strip()[-REASON_CHARACTERS:]}"
    elif forged:
        why = f"the run ended with {result.code} and names no failure"
    elif lost and (files := [n for n in statuses if statuses[n] == "ERROR" and "::" not in n]):
        why = f"{files[0]} cannot be collected: {report.strip()[-REASON_CHARACTERS:]}"
    elif lost:
        why = f"{len(lost)} tests that have to pass do not: {', '.join(lost[:3])}"
    elif not instance.fail_to_pass:
        why = "the instance names no test that has to pass now"
    return Grade(not why, statuses, report=report, why=why)


def run_judged(
    session: Session, ids: Sequence[str]
) -> tuple[CommandResult, dict[str, str], tuple[str, ...]]:
    """Run the files of these tests under `judge`: the result, the statuses, what was changed."""
    key = secrets.token_bytes(32)
    result = session.run(test_command(ids), stdin=key, output_bytes=OUTPUT_BYTES)
    for line in reversed(result.output.splitlines()):
        mark, _, sealed = line.partition(" ")
        seal, _, text = sealed.partition(" ")
        right = hashlib.blake2b(text.encode(), key=key).hexdigest()
        if mark == JUDGE_MARK and secrets.compare_digest(seal.encode(), right.encode()):
            found = ast.literal_eval(text)
            shown = replace(result, output=result.output.rpartition(f"\n{JUDGE_MARK} ")[0])
            return shown, found["statuses"], tuple(found["changed"])
    return result, {}, ()


def test_command(ids: Sequence[str]) -> str:
    """The shell command that runs the files of these tests, and nothing that they bring along."""
    alone = '--noconftest -c /dev/null -o pythonpath="$PWD $PWD/src" -p no:doctest -p no:junitxml'
    return f"PYTHONSAFEPATH=1 {_run_files(ids, f'-c {shlex.quote(JUDGE)}', alone)}"


def image_command(ids: Sequence[str]) -> str:
    """The same by pytest itself, with the repository's own settings and ``conftest.py``.

    They are the image's: no agent changes them.
    """
    return _run_files(ids, "-m pytest")


def _run_files(ids: Sequence[str], program: str, more: str = "") -> str:
    """What runs the files of these tests.

    Strings hash alike in every run: the order of a set decides no verdict by chance.
    """
    files = sorted({name.split("::")[0] for name in ids})
    options = (
        "-v -rpfExX --tb=short --show-capture=no --color=no -p no:cacheprovider "
        f'--rootdir="$PWD" {more} -o addopts='
    )
    return f"PYTHONHASHSEED=0 {PYTHON} {program} {options} {shlex.join(files)}"


test_command.__test__ = False  # type: ignore[attr-defined]  # pytest: it is none of yours


def parse_statuses(output: str) -> dict[str, str]:
    """The status of each test by its id: of pytest's last summary, skips of the lines before it.

    >>> parse_statuses('''
    ... tests/test_a.py::test_w SKIPPED (why) [ 50%]
    ... PASSED tests/test_a.py::forged
    ... ==== short test summary info ====
    ... PASSED tests/test_a.py::test_x
    ... FAILED tests/test_a.py::test_y[1 - 2] - assert 1 == 2
    ... ''')
    {'tests/test_a.py::test_w': 'SKIPPED', 'tests/test_a.py::test_x': 'PASSED', \
'tests/test_a.py::test_y[1 - 2]': 'FAILED'}
    """
    headers = list(_SUMMARY.finditer(output))
    if not headers:
        return {}
    before, after = output[: headers[-1].start()], output[headers[-1].end() :]
    statuses = {match[1]: _SKIPPED for match in _SKIPPED_LINE.finditer(before)}
    for match in _LINE.finditer(after):
        # What pytest writes of an expected failure that no test declares.
        is_made_up = match[1] == "XFAIL" and " - reason: " in match[2]
        statuses[_whole_id(match[2])] = "FAILED" if is_made_up else match[1]
    return statuses


def _whole_id(text: str) -> str:
    """An id without the message after it; a dash inside brackets belongs to the id."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "[") - (character == "]")
        if depth <= 0 and text.startswith(" - ", position):
            return text[:position]
    return text if depth <= 0 else text.split(" - ")[0]


def is_resolved(
    statuses: Mapping[str, str], fail_to_pass: Sequence[str], pass_to_pass: Sequence[str]
) -> bool:
    """SWE-bench's rule: all of both lists pass; of the second one, a test may also be skipped.

    Some ids of the published data end in the middle of a parameter; those stand for every test
    that begins like them.

    >>> is_resolved({"t.py::a[x y]": "PASSED", "t.py::b": "SKIPPED"}, ["t.py::a[x"], ["t.py::b"])
    True
    >>> is_resolved({"t.py::a": "SKIPPED"}, ["t.py::a"], [])
    False
    """
    return not lost_tests(statuses, fail_to_pass, pass_to_pass)


def lost_tests(
    statuses: Mapping[str, str], fail_to_pass: Sequence[str], pass_to_pass: Sequence[str]
) -> list[str]:
    """The tests that are not as `is_resolved` has them, each with its status."""
    return [
        f"{name} {statuses.get(name, 'is not there')}"
        for names, allowed in ((fail_to_pass, _PASSED), (pass_to_pass, _KEPT))
        for name in names
        if not _all_are(statuses, name, allowed)
    ]


def _all_are(statuses: Mapping[str, str], name: str, allowed: Sequence[str]) -> bool:
    if name in statuses:
        return statuses[name] in allowed
    if "[" not in name or name.endswith("]"):
        return False
    found = [status for whole, status in statuses.items() if whole.startswith(name)]
    return bool(found) and all(status in allowed for status in found)
