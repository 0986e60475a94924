"""R2E-Gym's way to grade: the image brings tests and a script, and every status has to be right."""

from __future__ import annotations

import re
from contextlib import closing

from aem_lightning.envs.swe.grading import (
    REPORT_CHARACTERS,
    Grade,
    apply_change,
    broken,
    graded_change,
)
from aem_lightning.envs.swe.instances import Instance
from aem_lightning.envs.swe.sandbox import Sandbox, SessionSpec

# The tests lie in the image: the agent's copy loses them, the one that grades puts them in place.
HIDE_TESTS = "rm -rf /r2e_tests r2e_tests run_tests.sh"
SHOW_TESTS = "[ -e r2e_tests ] || [ ! -e /r2e_tests ] || ln -s /r2e_tests r2e_tests"
# What an agent writes there would not apply to the copy that has them, or be run in their place.
LEFT_OUT = re.compile(r"^(r2e_tests(/|$)|run_tests\.sh$)")
LINE = re.compile(r"^(PASSED|FAILED|ERROR) \S*?::(.+?)(?: - .*)?$", re.MULTILINE)
COLOR = re.compile(r"\x1b\[[0-9;]*m")


def grade_expected(sandbox: Sandbox, instance: Instance, diff: str, spec: SessionSpec) -> Grade:
    """Apply a change in a fresh container and compare every test's status with the expected one.

    Source: R2E-Gym's ``_calculate_reward_r2e``; the fresh container is ours.
    """
    change = graded_change(instance, diff, LEFT_OUT)
    if isinstance(change, Grade):
        return change
    with closing(sandbox.open(spec)) as session:
        ended = apply_change(session, change.diff)
        if ended is not None:
            return ended
        result = session.run(f"{SHOW_TESTS}; {instance.eval_script}")
    if result.infra_error:
        return broken(result, "")
    statuses = expected_statuses(result.output)
    wanted = {_name(name): status for name, status in instance.expected.items()}
    other = [
        name for name in wanted.keys() | statuses.keys() if statuses.get(name) != wanted.get(name)
    ]
    why = f"{len(other)} tests end otherwise than expected: {', '.join(sorted(other)[:3])}"
    report = result.output[-REPORT_CHARACTERS:]
    return Grade(not other, statuses, report=report, why=why, left_out=change.left_out)


def expected_statuses(output: str) -> dict[str, str]:
    r"""The statuses of pytest's summary by R2E-Gym's names: the id without file, joined by dots.

    Example:
        >>> expected_statuses("= short test summary info =\nPASSED r2e_tests/test_1.py::A::test_b")
        {'A.test_b': 'PASSED'}
    """
    summary = COLOR.sub("", output).rpartition("short test summary info")[2]
    return {_name(name): status for status, name in LINE.findall(summary)}


def _name(name: str) -> str:
    return COLOR.sub("", name).replace("::", ".").split(" - ")[0].strip()
