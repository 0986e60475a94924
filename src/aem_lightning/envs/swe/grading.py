"""Whether a change resolves an instance: its tests decide, in a sandbox the agent never saw."""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from aem_lightning.envs.swe.changes import DiffError, FileChange, file_changes, text_of
from aem_lightning.envs.swe.instances import Instance
from aem_lightning.envs.swe.sandbox import CommandResult, Sandbox, Session, SessionSpec

REPORT_CHARACTERS = 4_000
# A test, or what helps one; an agent may write there, but it is not graded. Some projects ship a
# package called `test` or `testing`: those are tests only at the top of a repository.
TEST_PATH = re.compile(r"(^|/)[Tt]ests/|^(test|testing)/|(^|/)(test_[^/]*|[^/]*_test)\.py$")
# A path that reaches into the test runner or into the interpreter's start.
FORBIDDEN_PATH = re.compile(
    r"(^|/)(conftest|sitecustomize|usercustomize)\.py$|\.pth$|(^|/)(_?pytest|pluggy|py)(/|\.py$|$)"
    r"|(^|/)(pytest\.ini|\.pytest\.ini|tox\.ini)$"
)
# What product code has no reason to name, but code that fools its tests has.
FORBIDDEN_CODE = re.compile(
    r"pytest|pluggy|atexit|ctypes|\b_exit\b|\bsys(\.| import .*\b)modules\b|\bgc\.get_|/proc/"
)
CODE_SUFFIXES = (".py", ".pyc", ".pyd", ".so")
RUNNERS = ("pytest-dev/pytest", "pytest-dev/pluggy")  # whose fixes are changes of the runner
PYTEST_HINT = "pip install 'aem-lightning[swe]' beside the trainer, or take an image that has it"
FAILURES = frozenset({"FAILED", "ERROR"})
_PASSED, _SKIPPED = ("PASSED", "XFAIL"), "SKIPPED"
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
    """

    resolved: bool = False
    statuses: Mapping[str, str] = field(default_factory=dict)
    tampered: tuple[str, ...] = ()
    infra_error: str | None = None
    report: str = ""


def grade(sandbox: Sandbox, instance: Instance, base: bytes, diff: str, spec: SessionSpec) -> Grade:
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
    refused = refusal(instance, tampering(diff))
    if refused is not None:
        return refused
    with closing(sandbox.open(spec)) as session:
        graded = without_tests(diff, instance.test_patch)
        return _graded(session, instance, base, graded, spec.limits.wall_s)


def refusal(instance: Instance, tampered: tuple[str, ...]) -> Grade | None:
    """The grade of a change that tampers: its tests are not run. A fix of a runner may look so."""
    if not tampered or instance.repo in RUNNERS:
        return None
    return Grade(tampered=tampered, report="not run: " + "; ".join(tampered))


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


def apply(session: Session, diff: str, *options: str) -> CommandResult:
    """Apply a diff to the working folder."""
    command = " ".join(("git apply --whitespace=nowarn", *options, "-"))
    return session.run(command, stdin=diff.encode(), wall_s=60)


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
    resolved = not forged and is_resolved(statuses, instance.fail_to_pass, instance.pass_to_pass)
    return Grade(resolved, statuses, report=result.output[-REPORT_CHARACTERS:])


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
    return all(_all_are(statuses, name, _PASSED) for name in fail_to_pass) and all(
        _all_are(statuses, name, (*_PASSED, _SKIPPED)) for name in pass_to_pass
    )


def _all_are(statuses: Mapping[str, str], name: str, allowed: Sequence[str]) -> bool:
    if name in statuses:
        return statuses[name] in allowed
    if "[" not in name or name.endswith("]"):
        return False
    found = [status for whole, status in statuses.items() if whole.startswith(name)]
    return bool(found) and all(status in allowed for status in found)


def without_tests(diff: str, tests: str = "", left_out: re.Pattern[str] | None = None) -> str:
    """The parts of a diff that are graded: no tests, and no file of the diff ``tests``.

    Nor a file that ``left_out`` finds by its path.

    Binary files whose content git left out are dropped too: they stop git from applying the rest.
    Of a text that is no diff, nothing is graded.
    """
    try:
        parts = file_changes(diff)
    except DiffError:
        return ""
    theirs = _paths(tests)
    patterns = (TEST_PATH, left_out) if left_out else (TEST_PATH,)

    def is_left_out(path: str) -> bool:
        return path in theirs or any(pattern.search(path) for pattern in patterns)

    return text_of(p for p in parts if p.complete and not any(map(is_left_out, p.paths)))


def tampering(diff: str) -> tuple[str, ...]:
    r"""What in a change reaches for the test runner; tests themselves are not looked at.

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
    yield from (f"{path} is changed" for path in forbidden)
    if forbidden or any(map(TEST_PATH.search, part.paths)):
        return
    where = part.paths[-1]
    if part.binary and part.complete and where.endswith(CODE_SUFFIXES):
        yield f"{where} is code that cannot be read"
    for line in part.added:
        # Python reads an identifier in this normal form, so a look-alike is the same name.
        if FORBIDDEN_CODE.search(unicodedata.normalize("NFKC", line)):
            yield f"{where}: {line[:120]!r}"


def _paths(diff: str) -> frozenset[str]:
    """The files of a diff; none of one that cannot be read."""
    try:
        return frozenset(path for part in file_changes(diff) for path in part.paths)
    except DiffError:
        return frozenset()
