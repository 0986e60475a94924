"""Instances: a repository with a bug, its description, and the tests that tell whether it is fixed.

The columns are SWE-bench's; rows of R2E-Gym have an adapter. Both are read through `datasets`. The
agent sees the problem statement and the repository, nothing else of an instance.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Literal

from aem_lightning.envs.data import swe_file
from aem_lightning.types import Task

Source = Literal["embedded", "json", "parquet", "hub"]
SOURCES = ("embedded", "json", "parquet", "hub")
ADAPTERS = ("auto", "swebench", "r2e")
_TEXTS = ("repo", "instance_id", "base_commit", "patch", "test_patch", "problem_statement")
SWEBENCH_COLUMNS = (*_TEXTS, "FAIL_TO_PASS", "PASS_TO_PASS")
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

    def task(self, split: str) -> Task:
        """The instance as the rest of the house knows it; results are by repository."""
        return Task(self.instance_id, self.repo.rpartition("/")[2], split)


def from_swebench(row: Mapping[str, Any]) -> Instance:
    """A row in SWE-bench's columns; ``image`` or ``docker_image``, and ``eval_script``, if given.

    Raises:
        ValueError: A column is missing.
    """
    _require(row, SWEBENCH_COLUMNS, "swebench")
    return Instance(
        **{name: row[name] for name in _TEXTS},
        fail_to_pass=_names(row["FAIL_TO_PASS"]),
        pass_to_pass=_names(row["PASS_TO_PASS"]),
        version=str(row.get("version") or ""),
        image=row.get("image") or row.get("docker_image") or None,
        eval_script=row.get("eval_script") or "",
    )


def from_r2e(row: Mapping[str, Any]) -> Instance:
    """A row of R2E-Gym: an image with the repository and its tests, and what they have to say.

    Raises:
        ValueError: A column is missing.
    """
    _require(row, R2E_COLUMNS, "r2e")
    image = row["docker_image"]
    commit = row.get("commit_hash") or image.rpartition(":")[2]
    return Instance(
        instance_id=f"{row['repo_name']}__{commit}",
        repo=row["repo_name"],
        base_commit=commit,
        problem_statement=row["problem_statement"],
        image=image,
        eval_script="bash run_tests.sh",
        expected=json.loads(row["expected_output_json"]),
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

    Args:
        source: ``json`` and ``parquet`` read a file, ``hub`` a data set; ``embedded`` is ``json``.
        path: The file, or the name on the hub.
        split: Split of a hub data set.
        adapter: ``swebench``, ``r2e``, or ``auto``: what the columns say.
        cache_dir: Where `datasets` keeps what it has read.
        max_instances: Keep so many, the first by id.

    Raises:
        ValueError: An unknown source or adapter, a missing column, or an id given twice.
        FileNotFoundError: There is no such file.
    """
    if source not in SOURCES:
        raise ValueError(f"datamodule.source={source!r}; allowed: {', '.join(SOURCES)}")
    if adapter not in ADAPTERS:
        raise ValueError(f"datamodule.adapter={adapter!r}; allowed: {', '.join(ADAPTERS)}")
    rows = _rows(source, path, split, cache_dir)
    found = sorted((_adapter(adapter, row)(row) for row in rows), key=lambda row: row.instance_id)
    ids = [instance.instance_id for instance in found]
    twice = sorted({one for one, other in pairwise(ids) if one == other})
    if twice:
        raise ValueError(f"{path}: instance ids given more than once: {twice[:5]}")
    return found[:max_instances]


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
    missing = [name for name in columns if row.get(name) is None]
    if missing:
        raise ValueError(
            f"A row has no {', '.join(missing)}; adapter={adapter} needs {', '.join(columns)}. It "
            f"has: {', '.join(sorted(row))}. Another adapter: datamodule.adapter="
            f"{'swebench' if adapter == 'r2e' else 'r2e'}"
        )


def _names(value: str | Sequence[str]) -> tuple[str, ...]:
    """Test names, which SWE-bench writes as a JSON list inside a text."""
    return tuple(json.loads(value) if isinstance(value, str) else value)
