"""What graded episodes leave on disk, in the forms of SWE-bench's own harness."""

from __future__ import annotations

import fcntl
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from aem_lightning.envs.swe.grading import Grade, lost_tests
from aem_lightning.envs.swe.instances import Instance
from aem_lightning.envs.swe.tamper import without_files_of

PREDICTIONS = "predictions.jsonl"


def keep_record(folder: Path, model: str, instance: Instance, patch: str, grade: Grade) -> Path:
    """Write a graded change below ``folder``, of which other processes may be writing too.

    ``<instance_id>/<number>/`` gets ``patch.diff`` (its bytes as git wrote them),
    ``test_output.txt`` (the end of it) and ``report.json``; ``predictions.jsonl`` gets a line for
    ``swebench.harness.run_evaluation``, which takes one for each instance: bytes that are no UTF-8
    stand there as replacement characters, and files of the hidden tests are left out. The harness
    means to put those back itself, but puts none back where one of them is new: its tests then do
    not fit, and a fix counts as none.

    Returns:
        The folder of this one.
    """
    of_instance = folder / instance.instance_id.replace("/", "__")
    of_instance.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        place = of_instance / str(number)
        try:
            place.mkdir()
        except FileExistsError:
            continue
        break
    raw = patch.encode("utf-8", "surrogateescape")
    (place / "patch.diff").write_bytes(raw)
    (place / "test_output.txt").write_text(grade.report, encoding="utf-8", errors="replace")
    report = json.dumps({instance.instance_id: _report(instance, raw, grade)}, indent=2)
    (place / "report.json").write_text(report + "\n", encoding="utf-8")
    prediction = {
        "instance_id": instance.instance_id,
        "model_name_or_path": model,
        "model_patch": without_files_of(patch, instance.test_patch)
        .encode("utf-8", "surrogateescape")
        .decode("utf-8", "replace"),
    }
    with (folder / PREDICTIONS).open("a", encoding="utf-8") as lines:
        fcntl.flock(lines, fcntl.LOCK_EX)  # a patch may be longer than one write
        lines.write(json.dumps(prediction) + "\n")
    return place


def _report(instance: Instance, patch: bytes, grade: Grade) -> dict[str, object]:
    """The harness's report, with what `Grade` knows beyond it."""
    failed = [name for name in instance.fail_to_pass if lost_tests(grade.statuses, [name], [])]
    broken = [name for name in instance.pass_to_pass if lost_tests(grade.statuses, [], [name])]
    return {
        "patch_is_None": False,
        "patch_exists": bool(patch.strip()),
        "patch_successfully_applied": bool(grade.statuses),  # else no test has run
        "resolved": grade.resolved,
        "tests_status": {
            "FAIL_TO_PASS": _split(instance.fail_to_pass, failed),
            "PASS_TO_PASS": _split(instance.pass_to_pass, broken),
        },
        "reason": grade.reason,
        "tampered": list(grade.tampered),
        "left_out": list(grade.left_out),
    }


def _split(names: Sequence[str], lost: Sequence[str]) -> dict[str, list[str]]:
    return {"success": [name for name in names if name not in lost], "failure": list(lost)}
