"""SWE-bench's way to grade: the repository's own test command, its log read by `swebench`.

Django has a runner of its own, SymPy another, Sphinx runs tox: what to type for which version, and
how to read what comes out, is what the package knows. Nothing of it is used that needs the network
or builds images.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from aem_lightning.envs.base import MissingExtraError
from aem_lightning.envs.swe.changes import file_changes
from aem_lightning.envs.swe.grading import (
    FAILURES,
    RUNNERS,
    Grade,
    apply_change,
    broken,
    decided,
    graded_change,
    too_slow,
)
from aem_lightning.envs.swe.grading import (
    OUTPUT_BYTES as OUTPUT_BYTES,
)
from aem_lightning.envs.swe.images import REPOSITORIES  # known without the package
from aem_lightning.envs.swe.instances import Instance
from aem_lightning.envs.swe.sandbox import CommandResult, Sandbox, Session, SessionSpec
from aem_lightning.envs.swe.worktree import apply

# These runners read their settings from the repository, so its own settings stay as they are.
LEFT_OUT = re.compile(
    r"(^|/)(setup\.cfg|pyproject\.toml)$|^bin/|^sympy/(testing|utilities)/runtests\.py$"
)
# What runners say of a test that passed; product code has little reason to.
FORGERY = re.compile(r"\.\.\. +(ok|OK)\b|\btest_\w+ ok\b|\b(PASSED|XFAIL)\b")
LINE_CHARACTERS = 2_000  # some of the parsers' patterns take the square of a line's length
CONDA_ENVIRONMENT = "testbed"
_START, _END = ">>>>> Start Test Output", ">>>>> End Test Output"
_FAILURE = re.compile(r"FAIL|ERROR| [EF]\s*$")
_NOT_FOUND = (126, 127)  # what a shell answers for a command that is not there, or is no program
_PROBE_WALL_S = 60.0


@dataclass(frozen=True)
class Harness:
    """What is used of `swebench`.

    Attributes:
        specs: How to install and to test, by repository and version.
        parsers: What turns a log into the status of each test, by repository.
        write_script: The lines of an evaluation script.
    """

    specs: Mapping[str, Mapping[str, Mapping[str, Any]]]
    parsers: Mapping[str, Callable[[str, Any], dict[str, str]]]
    write_script: Callable[..., Sequence[str]]


def load_harness() -> Harness:
    """The package; the first time takes a second or two.

    Raises:
        MissingExtraError: It is not installed, or a release that has no test commands any more.
    """
    with _process_as_it_was():
        try:
            from swebench.harness.constants import MAP_REPO_VERSION_TO_SPECS
            from swebench.harness.log_parsers import MAP_REPO_TO_PARSER
            from swebench.harness.test_spec.create_scripts import make_eval_script_list
        except ImportError as error:
            raise MissingExtraError("swebench 4.1", "swebench") from error
    return Harness(MAP_REPO_VERSION_TO_SPECS, MAP_REPO_TO_PARSER, make_eval_script_list)


@contextlib.contextmanager
def _process_as_it_was() -> Iterator[None]:
    """Undo what importing the package does beside: it sets up logging and reads ``.env``."""
    root = logging.getLogger()
    handlers, level, variables = list(root.handlers), root.level, frozenset(os.environ)
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        for name in set(os.environ) - variables:
            del os.environ[name]


def is_official(instance: Instance) -> bool:
    """Whether an instance is an image of SWE-bench, which its own test command has to grade."""
    told = bool(instance.version or instance.eval_script)
    return told and instance.image is not None and instance.repo in REPOSITORIES


def check_official(instances: Iterable[Instance]) -> None:
    """Find out before any work that instances cannot be graded.

    Raises:
        MissingExtraError: `swebench` is not installed, and one of them needs it.
        ValueError: `swebench` does not know a version.
    """
    for instance in filter(is_official, instances):
        eval_script(instance, load_harness())


def eval_script(instance: Instance, harness: Harness) -> str:
    """The script that grades an instance: the row's own, else what the harness writes.

    Raises:
        ValueError: The row has none, and the harness does not know its version.
    """
    if instance.eval_script:
        return instance.eval_script
    known = harness.specs[instance.repo]
    if instance.version not in known:
        raise ValueError(
            f"{instance.instance_id}: swebench has no test command for version "
            f"{instance.version!r} of {instance.repo}; it has {', '.join(sorted(known))}. Give "
            "the row a column eval_script, or leave the row out"
        )
    columns = ("instance_id", "repo", "version", "base_commit", "test_patch")
    row = {name: getattr(instance, name) for name in columns}
    lines = harness.write_script(
        row,
        known[instance.version],
        CONDA_ENVIRONMENT,
        f"/{CONDA_ENVIRONMENT}",
        instance.base_commit,
        instance.test_patch,
    )
    return "\n".join(["set -uo pipefail", *lines])


def quiet_script(script: str) -> str:
    r"""An evaluation script that writes what its tests write, and ends with their exit status.

    What comes before the tests, as installing the repository, runs in the same shell in silence,
    and what comes after them not at all: so there is no marker in the output that somebody could
    forge. A script without SWE-bench's two markers is all tests.

    >>> script = f"cd /testbed\n: '{_START}'\nbin/test a.py\n: '{_END}'\ngit checkout a.py"
    >>> print(quiet_script(script))
    {
    export PIP_NO_INDEX=1
    cd /testbed
    } > /dev/null 2>&1
    bin/test a.py
    """
    lines = script.split("\n")  # a patch inside may hold other line ends
    marks = [next((i for i, line in enumerate(lines) if m in line), -1) for m in (_START, _END)]
    start, end = marks if -1 < marks[0] < marks[1] else (-1, len(lines))
    # There is no network: pip is to say so at once, not after all its retries.
    before = ["{", "export PIP_NO_INDEX=1", *lines[: max(0, start)], "} > /dev/null 2>&1"]
    return "\n".join([*before, *lines[start + 1 : end]])


def grade_official(sandbox: Sandbox, instance: Instance, diff: str, spec: SessionSpec) -> Grade:
    """Apply a change in a fresh container and run the tests as SWE-bench runs them.

    Changes to tests, to files of the test patch and to settings of the runner are left out. The
    agent's code runs in the process that says what passed, as it does at SWE-bench. Against lines
    that it prints itself stand the scan for a runner's words, the exit status, and that a failure
    outweighs whatever else is said of a test.

    Source: SWE-bench's harness; the fresh container and what is left out are ours.

    Raises:
        MissingExtraError: `swebench` is not installed.
        ValueError: `swebench` does not know the version.
    """
    change = graded_change(instance, diff, LEFT_OUT)
    if isinstance(change, Grade):
        return change
    forged = _forgery(change.diff)
    if forged and instance.repo not in RUNNERS:
        return Grade(tampered=forged, report="not run: " + "; ".join(forged))
    harness = load_harness()
    command = quiet_script(eval_script(instance, harness))
    with contextlib.closing(sandbox.open(spec)) as session:
        if instance.test_patch.strip():
            # The script applies it; that it fits without the change is not the agent's doing.
            patched = apply(session, instance.test_patch, "--check")
            if patched.code:
                return broken(patched, "the test patch does not apply")
        ended = apply_change(session, change.diff)
        if ended is not None:
            return ended
        result = _run(session, command)
    if result.infra_error:
        return broken(result, "")
    if result.timed_out:
        return too_slow(result, spec.limits.wall_s)
    statuses = _parsed(harness, instance, result.output)
    if not statuses:
        missing = _without_change(sandbox, spec, command)
        if missing is not None:
            return missing
    return replace(decided(result, statuses, instance), left_out=change.left_out)


def _run(session: Session, command: str, wall_s: float | None = None) -> CommandResult:
    # By standard input: a test patch can be longer than an argument may be.
    return session.run('eval "$(cat)"', stdin=command.encode(), wall_s=wall_s)


def _forgery(change: str) -> tuple[str, ...]:
    return tuple(
        f"{part.paths[-1]}: {line[:120]!r}"
        for part in file_changes(change)
        for line in part.added
        if FORGERY.search(line)
    )


def _parsed(harness: Harness, instance: Instance, output: str) -> dict[str, str]:
    """The status of each test; of two, the one that is no success."""
    parse = harness.parsers[instance.repo]
    lines = [line[:LINE_CHARACTERS] for line in output.split("\n")]
    statuses: dict[str, str] = {}
    try:
        statuses |= parse("\n".join(lines), None)
        for line in filter(_FAILURE.search, lines):
            found = parse(line, None).items()
            statuses |= {name: status for name, status in found if status in FAILURES}
    except (IndexError, ValueError):  # a line that begins like a result, and is none
        return {}
    return statuses


def _without_change(sandbox: Sandbox, spec: SessionSpec, command: str) -> Grade | None:
    """What is wrong with an image whose runner is not there, told by a container of its own.

    In the one with the change, an agent could choose that exit status and have its failure masked.
    """
    with contextlib.closing(sandbox.open(spec)) as session:
        result = _run(session, command, min(_PROBE_WALL_S, spec.limits.wall_s))
    if result.infra_error or result.code in _NOT_FOUND:
        return broken(result, "the tests cannot be run in this image")
    return None
