"""Instances: a repository with a bug, its description, and the tests that tell whether it is fixed.

The columns are SWE-bench's and its followers'; rows of R2E-Gym have an adapter. All are read
through `datasets`. The agent sees the problem statement and the repository, nothing else of an
instance.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from aem_lightning.envs.data import swe_file
from aem_lightning.envs.swe.images import image_of
from aem_lightning.envs.swe.patches import make_diff, reversed_diff
from aem_lightning.envs.swe.sandbox.base import WORKDIR
from aem_lightning.types import Task

logger = logging.getLogger(__name__)

Source = Literal["embedded", "json", "parquet", "hub"]
SOURCES = ("embedded", "json", "parquet", "hub")
ADAPTERS = ("auto", "swebench", "r2e")
_TEXTS = ("repo", "instance_id", "base_commit", "patch", "test_patch", "problem_statement")
FAIL, PASS = "FAIL_TO_PASS", "PASS_TO_PASS"
TESTS = {FAIL: FAIL, PASS: PASS}  # whatever their case: SWE-bench Pro has them in small letters
SWEBENCH_COLUMNS = (*_TEXTS, FAIL, PASS)
R2E_COLUMNS = ("docker_image", "repo_name", "expected_output_json", "problem_statement")


@dataclass(frozen=True)
class Instance:
    """One row of a data set.

    Attributes:
        instance_id: Unique.
        repo: ``owner/name``.
        base_commit: The commit that has the bug.
        problem_statement: All that the agent is told.
        patch: The fix; "" where the data set has none.
        test_patch: Adds the tests that the bug breaks.
        fail_to_pass: Tests that a fix makes pass.
        pass_to_pass: Tests that pass before and have to pass still.
        version: Of the repository, as SWE-bench counts; tells how an image of it is tested.
        image: The container image that holds the repository; None where it comes as files.
        eval_script: What runs the tests, where the row has it.
        expected: Of R2E-Gym, the status that each test of ``eval_script`` has to have.
        setup_patch: Applied to the image first: the bug, where the image is without it.
        workdir: Where the repository lies in the image.
    """

    instance_id: str
    repo: str
    base_commit: str
    problem_statement: str
    patch: str = ""
    test_patch: str = ""
    fail_to_pass: tuple[str, ...] = ()
    pass_to_pass: tuple[str, ...] = ()
    version: str = ""
    image: str | None = None
    eval_script: str = ""
    expected: Mapping[str, str] = field(default_factory=dict, hash=False)
    setup_patch: str = ""
    workdir: str = WORKDIR

    def task(self, split: str) -> Task:
        """The instance as the rest of the house knows it; results are by repository."""
        return Task(self.instance_id, self.repo.rpartition("/")[2], split)


def from_swebench(row: Mapping[str, Any]) -> Instance:
    """A row in SWE-bench's columns, also as other data sets that follow it publish theirs.

    Known are the classic columns and those of release 5, SWE-smith, SWE-rebench, SWE-Gym and
    SWE-bench Pro; the image is the row's own, or the one that the data set is published with.

    Raises:
        ValueError: A column is missing, cannot be read, or names no test that a fix has to mend.
    """
    row = {TESTS.get(name.upper(), name): value for name, value in row.items()}
    _require(row, ("repo", "instance_id", "base_commit", "problem_statement", FAIL), "swebench")
    name, image, patch = row["instance_id"], image_of(row), row.get("patch") or ""
    # SWE-smith's images hold the repository as it should be, and its patches are the bugs.
    is_bug = "swesmith" in (image or "") and not row.get("test_patch")
    asked = [row["problem_statement"], row.get("requirements"), row.get("interface")]
    heads = ("", "\n\nRequirements:\n", "\n\nNew interfaces introduced:\n")  # of SWE-bench Pro
    instance = Instance(
        name,
        row["repo"],
        row["base_commit"],
        "".join(head + text for head, text in zip(heads, asked, strict=True) if text),
        patch=reversed_diff(patch) if is_bug else patch,
        test_patch=row.get("test_patch") or "",
        fail_to_pass=_names(row, FAIL),
        pass_to_pass=_names(row, PASS),
        version=str(row.get("version") or ""),
        image=image,
        eval_script=row.get("eval_script") or "",
        setup_patch=patch if is_bug else "",
        workdir="/app" if row.get("dockerhub_tag") else WORKDIR,
    )
    if not instance.problem_statement.strip():
        raise ValueError(
            f"{name}: problem_statement is empty, and it is all that the agent is told"
        )
    if not instance.fail_to_pass:
        raise ValueError(f"{name}: {FAIL} is empty, so doing nothing would resolve it")
    return instance


def from_r2e(row: Mapping[str, Any]) -> Instance:
    """A row of R2E-Gym: an image with the repository and its tests, and what they have to say.

    Raises:
        ValueError: A column is missing or empty.
    """
    _require(row, R2E_COLUMNS, "r2e")
    image = row["docker_image"]
    commit = row.get("commit_hash") or image.rpartition(":")[2]
    expected = json.loads(row["expected_output_json"])
    if not expected:
        raise ValueError(f"{image}: expected_output_json is empty: there is no test to grade by")
    return Instance(
        instance_id=f"{row['repo_name']}__{commit}",
        repo=row["repo_name"],
        base_commit=commit,
        problem_statement=row["problem_statement"],
        patch=_r2e_patch(json.loads(row.get("parsed_commit_content") or "{}")),
        image=image,
        eval_script="bash run_tests.sh",
        expected=expected,
    )


def _r2e_patch(commit: Mapping[str, Any]) -> str:
    """The files that R2E-Gym's commit changed, as a diff; tests are left out when it is graded."""
    return "".join(
        make_diff(
            file["header"]["file"]["path"],
            file.get("old_file_content") or "",
            file.get("new_file_content") or "",
        )
        for file in commit.get("file_diffs") or ()
    )


def load_instances(
    source: Source,
    path: str,
    *,
    split: str = "train",
    adapter: str = "auto",
    cache_dir: str | None = None,
    max_instances: int | None = None,
) -> list[Instance]:
    """The instances of a file or of a hub data set, sorted by id.

    Rows that cannot be played are left out, and so is what repeats an id; a warning says which.

    Args:
        source: ``json`` and ``parquet`` read a file, ``hub`` a data set; ``embedded`` is ``json``.
        path: The file, or the name on the hub.
        split: Split of a hub data set.
        adapter: ``swebench``, ``r2e``, or ``auto``: what the columns say.
        cache_dir: Where `datasets` keeps what it has read.
        max_instances: Keep so many, the first by id.

    Raises:
        ValueError: An unknown source or adapter, or no row can be played.
        FileNotFoundError: There is no such file.
    """
    if source not in SOURCES:
        raise ValueError(f"datamodule.source={source!r}; allowed: {', '.join(SOURCES)}")
    if adapter not in ADAPTERS:
        raise ValueError(f"datamodule.adapter={adapter!r}; allowed: {', '.join(ADAPTERS)}")
    found: dict[str, Instance] = {}
    refused: list[str] = []
    for row in _rows(source, path, split, cache_dir):
        try:
            instance = _adapter(adapter, row)(row)
        except ValueError as error:
            refused.append(str(error))
            continue
        if instance.instance_id in found:
            refused.append(f"{instance.instance_id} is given more than once: the first is kept")
        found.setdefault(instance.instance_id, instance)
    if refused and not found:
        raise ValueError(f"{path}: no row can be played. {refused[0]}")
    if refused:
        text = "%s: %d rows are left out, so the first: %s"
        logger.warning(text, path, len(refused), "; ".join(refused[:5]))
    return [found[name] for name in sorted(found)][:max_instances]


def instances_hash(instances: Iterable[Instance]) -> str:
    """Twelve hex digits that stand for a set of instances, in any order."""
    lines = sorted(
        json.dumps([i.instance_id, i.base_commit, i.problem_statement, i.test_patch, i.image])
        for i in instances
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def _rows(source: str, path: str, split: str, cache_dir: str | None) -> Iterable[Mapping[str, Any]]:
    # Imported here: it takes a second, which workers need not spend.
    import datasets

    load = partial(datasets.load_dataset, cache_dir=cache_dir)
    if source == "hub":
        rows: Iterable[Mapping[str, Any]] = load(path, split=split)
    else:
        kind = "parquet" if source == "parquet" else "json"
        rows = load(kind, data_files=str(swe_file(path, split)), split="train")
    return rows


def _adapter(name: str, row: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Instance]:
    if name == "auto":
        name = "r2e" if "expected_output_json" in row and "test_patch" not in row else "swebench"
    return from_r2e if name == "r2e" else from_swebench


def _require(row: Mapping[str, Any], columns: Sequence[str], adapter: str) -> None:
    if all(row.get(name) is not None for name in columns):
        return
    known = SWEBENCH_COLUMNS if adapter == "swebench" else columns
    missing = [name for name in known if row.get(name) is None]
    raise ValueError(
        f"A row has no {', '.join(missing)}; adapter={adapter} needs {', '.join(columns)}. It "
        f"is {row.get('instance_id') or 'without an id'} and has: {', '.join(sorted(row))}. "
        f"Another adapter: datamodule.adapter={'swebench' if adapter == 'r2e' else 'r2e'}"
    )


def _names(row: Mapping[str, Any], column: str) -> tuple[str, ...]:
    """Test names: a list, or one inside a text, in JSON or as Python prints it."""
    value = row.get(column)
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            with contextlib.suppress(SyntaxError, ValueError):
                value = ast.literal_eval(value.strip())
    names = () if value is None or value == "" else value
    is_list = isinstance(names, Iterable) and not isinstance(names, str | Mapping)
    if not is_list or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{row['instance_id']}: {column}={row[column]!r:.200} is no list of test names; "
            "expected is a list, or a text that holds one in JSON or as a Python literal"
        )
    return tuple(names)
