"""Whether a change resolves an instance: its tests decide, in a sandbox the agent never saw."""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

from aem_lightning.envs.answers import printable
from aem_lightning.envs.swe.changes import (
    DiffError,
    FileChange,
    diff_text,
    file_changes,
    text_of,
)
from aem_lightning.envs.swe.instances import Instance
from aem_lightning.envs.swe.sandbox import CommandResult, Limits, Sandbox, Session, SessionSpec
from aem_lightning.envs.swe.worktree import apply

GRADE_S = 300.0
REPORT_CHARACTERS = 4_000
REASON_CHARACTERS = 300
# A test, or what helps one; an agent may write there, but it is not graded. Some projects ship a
# package called `test` or `testing`: those are tests only at the top of a repository.
TEST_PATH = re.compile(r"(^|/)[Tt]ests/|^(test|testing)/|(^|/)(test_[^/]*|[^/]*_test)\.py$")
# Settings of a runner, and what building or installing leaves behind: not graded either.
LEFT_OVER = re.compile(
    r"(^|/)conftest\.py$|(^|/)(\.?pytest|tox)\.ini$|(^|/)noxfile\.py$|\.pth$"
    r"|(^|/)(\.?v?env|site-packages|\.tox|\.nox|\.eggs|[^/]+\.(egg|dist)-info)/"
)
# A path that takes the place of the test runner, or of the interpreter's start.
FORBIDDEN_PATH = re.compile(r"^(src/)?((site|user)customize\.py$|(_?pytest|pluggy|py)(/|\.py$|$))")
# Code that names the runner. A new file of it is a script that reproduces the bug, and left out.
RUNNER_CODE = re.compile(
    r"\b(import|from)\b.*\b_?(pytest|pluggy)|\b(_pytest|pytest_\w+)\b|\b(pytest|pluggy)\.\w"
    r"|['\"]_?(pytest|pluggy)"
)
# What else product code has no reason to name, but code that fools its tests has. Of the loaded
# modules it may ask for its own.
FORBIDDEN_CODE = re.compile(
    r"\b(atexit|ctypes|_exit)\b|\bgc\.get_|/proc/|\bsys import .*\bmodules\b"
    r"|(?<!in )\bsys\.modules\b(?!\[(__name__|\w+(\.\w+)*\.__module__|['\"]__main__['\"])\])"
)
SOURCE_SUFFIXES = (".py", ".pyi", ".pyw", ".pyx", ".pxd", ".pxi")
PACKED_SUFFIXES = (".py", ".pyc", ".pyd", ".so")
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
        parts = [self.why or self.infra_error or self.report[-REASON_CHARACTERS:]]
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
    path, and pytest reads no configuration and no ``conftest.py``: what a repository says about
    the runner does not reach it. Product code that patches the runner *while it is tested* could
    still pass; `tampering` looks for that.

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
    scripts = [] if spared else [part for part in parts if _is_script(part)]
    kept = without_tests(
        text_of(part for part in parts if part not in scripts), instance.test_patch, left_out
    )
    tampered = () if spared else tampering(kept)
    if tampered:
        return Grade(tampered=tampered, report="not run: " + "; ".join(tampered))
    named = [f"{p.paths[-1]}, which names a test runner" for p in scripts if not _is_test(p)]
    return GradedChange(kept, tuple(map(printable, named)))


def _graded(session: Session, instance: Instance, base: bytes, diff: str, wall_s: float) -> Grade:
    if base:
        unpacked = session.put_tar(base)
        if unpacked.code:
            return broken(unpacked, "the base tree cannot be unpacked")
    # Tests first: where they do not fit the base, that is never the agent's doing.
    if instance.test_patch.strip():
        patched = apply(session, instance.test_patch)
        if patched.code:
            return broken(patched, "the test patch does not apply")
    ended = apply_change(session, diff)
    if ended is not None:
        return ended
    expected = [*instance.fail_to_pass, *instance.pass_to_pass]
    result = session.run(test_command(expected))
    if result.infra_error:
        return broken(result, "")
    if result.timed_out:
        return too_slow(result, wall_s)
    statuses = parse_statuses(result.output)
    if not statuses:
        # Away from the working folder and the home: an agent cannot choose to be told apart.
        there = session.run("python -s -c 'import pytest'", cwd="/", wall_s=60)
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
    elif lost:
        why = f"{len(lost)} tests that have to pass do not: {', '.join(lost[:3])}"
    elif not instance.fail_to_pass:
        why = "the instance names no test that has to pass now"
    return Grade(not why, statuses, report=report, why=why)


def test_command(ids: Sequence[str]) -> str:
    """The shell command that runs the files of these tests, and nothing that they bring along.

    Strings hash alike in every run: the order of a set decides no verdict by chance.
    """
    files = sorted({name.split("::")[0] for name in ids})
    options = (
        "-v -rpfExX --tb=short --show-capture=no --color=no -p no:cacheprovider --noconftest "
        '-c /dev/null --rootdir="$PWD" -o pythonpath="$PWD $PWD/src" -o addopts='
    )
    variables = "PYTHONSAFEPATH=1 PYTHONHASHSEED=0"
    return f"{variables} python -m pytest {options} {' '.join(map(shlex.quote, files))}"


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
        statuses[_whole_id(match[2])] = match[1]
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


def without_tests(diff: str, tests: str = "", left_out: re.Pattern[str] | None = None) -> str:
    """The parts of a diff that are graded: no tests, and no file of the diff ``tests``.

    Nor a file that ``left_out`` finds by its path, nor what runners and builds leave behind.

    Binary files whose content git left out are dropped too: they stop git from applying the rest.
    Of a text that is no diff, nothing is graded.
    """
    try:
        parts = file_changes(diff)
    except DiffError:
        return ""
    theirs = _paths(tests)
    patterns = (TEST_PATH, LEFT_OVER, *([left_out] if left_out else []))

    def is_left_out(path: str) -> bool:
        return path in theirs or any(pattern.search(path) for pattern in patterns)

    return text_of(p for p in parts if p.complete and not any(map(is_left_out, p.paths)))


def tampering(diff: str) -> tuple[str, ...]:
    r"""What in a change reaches for the test runner; tests and texts are not looked at.

    A text that git does not write is tampering as well: what is no diff could be anything.

    >>> head = "diff --git a/m.py b/m.py\n--- a/m.py\n+++ b/m.py\n"
    >>> tampering(head + "@@ -0,0 +1 @@\n+import atexit\n")
    ("m.py: 'import atexit'",)
    """
    try:
        parts = file_changes(diff)
    except DiffError as error:
        return (str(error),)
    return tuple(words for part in parts for words in _tampering_of(part))


def _tampering_of(part: FileChange) -> Iterator[str]:
    forbidden = [path for path in part.paths if FORBIDDEN_PATH.search(path)]
    yield from (f"{printable(path)} is changed" for path in forbidden)
    if forbidden or _is_test(part):
        return
    where = printable(part.paths[-1])
    if part.binary and part.complete and where.endswith(PACKED_SUFFIXES):
        yield f"{where} is code that cannot be read"
    for line in _code(part):
        if RUNNER_CODE.search(line) or FORBIDDEN_CODE.search(line):
            yield f"{where}: {line[:120]!r}"


def _is_test(part: FileChange) -> bool:
    return any(map(TEST_PATH.search, part.paths))


def _is_script(part: FileChange) -> bool:
    return part.is_new and any(map(RUNNER_CODE.search, _code(part)))


def _code(part: FileChange) -> Iterator[str]:
    """The added lines of a source file, as Python takes them."""
    if part.paths[-1].endswith(SOURCE_SUFFIXES):
        for line in "\r".join(part.added).split("\r"):  # a line end within a comment ends it
            if not line.lstrip().startswith("#"):
                # Python reads an identifier in this normal form: a look-alike is the same name.
                yield unicodedata.normalize("NFKC", line)


def _paths(diff: str) -> frozenset[str]:
    """The files of a diff; none of one that cannot be read."""
    try:
        return frozenset(path for part in file_changes(diff) for path in part.paths)
    except DiffError:
        return frozenset()
