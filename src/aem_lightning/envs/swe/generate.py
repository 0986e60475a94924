"""Instances made on the spot: embedded or invented libraries with bugs, in SWE-bench's own columns.

``python -m aem_lightning.envs.swe.generate --out DIR --count 120`` fills a folder with a file for
each split, a clone of every library, and a manifest. An instance counts only after its fix was
graded 1 and doing nothing was graded 0, by the code that grades the agent. Invented functions are
made so that it is known; the first few are graded all the same.
"""

from __future__ import annotations

import argparse
import ast
import json
import logging
import random
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from math import ceil
from pathlib import Path
from typing import Any

from aem_lightning.envs.swe.grading import grade, run_judged
from aem_lightning.envs.swe.instances import from_swebench
from aem_lightning.envs.swe.invention import FUNCTIONS, invent
from aem_lightning.envs.swe.libraries import TEST_FILE, Library, load_libraries
from aem_lightning.envs.swe.mutations import Mutation, functions, mutations
from aem_lightning.envs.swe.patches import make_diff
from aem_lightning.envs.swe.repositories import write_repository
from aem_lightning.envs.swe.sandbox import Limits, Sandbox, SessionSpec, tar_of
from aem_lightning.envs.swe.sandbox.base import KILLED, OVER_CPU
from aem_lightning.envs.swe.settings import SweSettings, choose_sandbox
from aem_lightning.envs.swe.words import REPORTED, WANTED, swaps

logger = logging.getLogger(__name__)

VERSION = 1
MANIFEST = "manifest.json"
REPOSITORIES = "repositories"
SPLITS = ("train", "valid_seen", "valid_unseen")
UNSEEN = frozenset({"calendars", "units"})  # libraries that training never shows
HELD_OUT = 5  # of the others' instances, one in so many is for evaluation
FORMATS = ("json", "parquet")
# A bug may loop for ever. What it costs the processor ends it: a busy machine spoils no instance.
TRIAL = Limits(wall_s=120.0, cpu_s=10)
TELL_S = 30.0  # between two lines of how far it is
Row = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """A bug that may become an instance."""

    library: Library
    mutation: Mutation


@dataclass(frozen=True)
class Tried:
    """What became of a candidate: an instance without its commit, and the files; or neither."""

    outcome: str
    row: Row | None = None
    files: Mapping[str, str] | None = None


def generate_instances(
    out: str | Path,
    *,
    count: int = 120,
    seed: int = 0,
    most_edits: int | None = None,
    invented: bool = False,
    sandbox: Sandbox | None = None,
    workers: int = 2,
    file_format: str = "json",
) -> dict[str, Any]:
    """Fill ``out`` with ``count`` instances, where it is not there yet; what its manifest holds.

    The folder appears all at once. Equal arguments give equal instances.

    Args:
        out: The folder.
        count: Instances over all splits.
        seed: Another seed gives other bugs.
        most_edits: See `candidates`.
        invented: Bugs of invented functions, one of each, in the place of the embedded libraries.
        sandbox: Where tests run. They are the project's own: without one, the best that works here,
            if only a local one.
        workers: Tests run at once.
        file_format: ``json`` or ``parquet``.

    Raises:
        ValueError: The libraries have not so many bugs that tests find, or an unknown format.
    """
    out = Path(out).expanduser().absolute()
    if (out / MANIFEST).is_file():
        return dict(json.loads((out / MANIFEST).read_text(encoding="utf-8")))
    if file_format not in FORMATS:
        raise ValueError(f"file_format={file_format!r}; allowed: {', '.join(FORMATS)}")
    logger.info("making %d instances in %s", count, out)
    start = time.perf_counter()
    sandbox = sandbox or choose_sandbox(SweSettings(allow_unsafe=True))
    waiting = _enough(count, seed, most_edits) if invented else candidates(seed, most_edits)
    found, outcomes = _try_until(count, waiting, sandbox, workers, known=invented)
    manifest = {
        "version": VERSION,
        "count": count,
        "seed": seed,
        "most_edits": most_edits,
        "invented": invented,
        "sandbox": sandbox.name,
        "outcomes": dict(sorted(outcomes.items())),
        "seconds": round(time.perf_counter() - start, 1),
    }
    _place(out, found, manifest, file_format)
    return manifest


def _place(out: Path, found: Sequence[Tried], manifest: dict[str, Any], file_format: str) -> None:
    """Write beside the target, then rename; the sizes of the splits join the manifest."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
        beside = Path(folder) / out.name
        beside.mkdir()
        manifest["sizes"] = _write(beside, found, file_format)
        _write_json(beside / MANIFEST, manifest)
        try:
            beside.rename(out)
        except OSError:
            if not (out / MANIFEST).is_file():  # else another process was quicker, with the same
                raise


def candidates(
    seed: int, most_edits: int | None = None, invented: Sequence[Library] | None = None
) -> list[Candidate]:
    """Every bug of every embedded library, in turn from each, in an order that the seed decides.

    With ``most_edits`` those alone of which one edit in the words dialect is the fix, in functions
    where it knows no more than so many. Of ``invented`` libraries one bug a function.
    """
    if invented is not None:
        return _in_turn(
            [_bugs(one, f"{seed}/{n}", most_edits, one_each=True) for n, one in enumerate(invented)]
        )
    return _in_turn([_bugs(one, f"{seed}/{one.name}", most_edits) for one in load_libraries()])


def _enough(count: int, seed: int, most_edits: int | None) -> list[Candidate]:
    """Those of ``count`` invented functions, and of some more: not every function has one."""
    piles: list[list[Candidate]] = []
    while sum(map(len, piles)) < 1.1 * count:
        numbers = range(len(piles), len(piles) + ceil(count / FUNCTIONS))
        piles += [
            _bugs(invent(seed, number), f"{seed}/{number}", most_edits, one_each=True)
            for number in numbers
        ]
    return _in_turn(piles)


def _bugs(
    library: Library, key: str, most_edits: int | None, *, one_each: bool = False
) -> list[Candidate]:
    """Those of a library in the order that ``key`` decides; where asked, one of each function."""
    bugs = [
        bug
        for bug in mutations(library.core)
        if most_edits is None or 0 < _edits(bug) <= most_edits
    ]
    random.Random(key).shuffle(bugs)
    if one_each:
        bugs = [*{bug.symbol: bug for bug in bugs}.values()]
    return [Candidate(library, bug) for bug in bugs]


def _in_turn(piles: Sequence[Sequence[Candidate]]) -> list[Candidate]:
    return [one for turn in zip_longest(*piles) for one in turn if one is not None]


def _edits(bug: Mutation) -> int:
    """What could be edited in words in the function; 0 where the fix is none of it."""
    function = dict(functions(ast.parse(bug.source)))[bug.symbol]
    lines = bug.source.splitlines()[: function.end_lineno]
    if (bug.new, bug.old) not in swaps(lines[bug.line - 1]):
        return 0
    return sum(len(swaps(line)) for line in lines[function.lineno - 1 :])


def _try_until(
    count: int, waiting: list[Candidate], sandbox: Sandbox, workers: int, *, known: bool
) -> tuple[list[Tried], Counter[str]]:
    """The first ``count`` candidates that make an instance; what became of all that were tried.

    Where it is ``known`` which tests find a bug, most are not run.
    """
    outcomes: Counter[str] = Counter()
    found: list[Tried] = []
    told = time.monotonic()
    in_sandbox = partial(try_candidate, sandbox)
    with ThreadPoolExecutor(workers) as pool:
        while waiting:
            # A few at a time, so that few are tried in vain.
            part, waiting = waiting[: 2 * workers], waiting[2 * workers :]
            is_told = known and len(found) >= 2 * workers
            for tried in map(told_candidate, part) if is_told else pool.map(in_sandbox, part):
                if len(found) < count:
                    outcomes[tried.outcome] += 1
                    found += [tried] if tried.row is not None else []
            if len(found) >= count:
                return found, outcomes
            if time.monotonic() - told > TELL_S:
                told = time.monotonic()
                logger.info("%d of %d instances", len(found), count)
    raise ValueError(
        f"count={count}: the libraries give only {len(found)} such instances ({dict(outcomes)}); "
        "type a count of at most that"
    )


def try_candidate(sandbox: Sandbox, candidate: Candidate) -> Tried:
    """Run the tests on a bug, and grade its instance with the fix and without."""
    library, bug = candidate.library, candidate.mutation
    statuses = _statuses(sandbox, library.tree(bug.source, library.tests))
    if statuses is None:
        return Tried("timeout")
    if not statuses:
        return Tried("not_collected")
    failing = sorted(name for name, status in statuses.items() if status != "PASSED")
    passing = sorted(set(statuses) - set(failing))
    if not failing:
        return Tried("survived")
    if not passing:
        return Tried("nothing_passes")
    row, files = _instance(candidate, failing, passing)
    instance = from_swebench(row)
    tried = partial(grade, sandbox, instance, _archive(files), spec=SessionSpec(limits=TRIAL))
    if not tried(instance.patch).resolved:
        return Tried("fix_fails")
    if tried("").resolved:
        return Tried("nothing_resolves")
    return Tried("valid", row, files)


def told_candidate(candidate: Candidate) -> Tried:
    """The instance of an invented function, without a run: its own test alone finds its bug."""
    names = {name for name, _ in functions(ast.parse(candidate.library.core))}
    broken = candidate.mutation.symbol
    passing = [f"{TEST_FILE}::test_{name}" for name in sorted(names - {broken})]
    return Tried("valid", *_instance(candidate, [f"{TEST_FILE}::test_{broken}"], passing))


def _instance(
    candidate: Candidate, failing: list[str], passing: list[str]
) -> tuple[Row, Mapping[str, str]]:
    """Its row without a commit, and its files."""
    library = candidate.library
    visible = library.tests_without({name.partition("::")[2] for name in failing})
    files = library.tree(candidate.mutation.source, visible)
    return _row(candidate, failing, passing, visible), files


def _archive(files: Mapping[str, str]) -> bytes:
    return tar_of({path: text.encode() for path, text in files.items()})


def _statuses(sandbox: Sandbox, files: Mapping[str, str]) -> dict[str, str] | None:
    """What the tests say; None where they do not end."""
    with closing(sandbox.open(SessionSpec(limits=TRIAL))) as session:
        done = session.put_tar(_archive(files))
        statuses: dict[str, str] = {}
        if done.code == 0:
            done, statuses, _ = run_judged(session, [TEST_FILE])
    if done.infra_error:
        raise RuntimeError(f"sandbox={sandbox.name}: {done.infra_error}")
    endless = done.timed_out or done.code in (KILLED, OVER_CPU)
    return None if endless else statuses


def _row(candidate: Candidate, failing: list[str], passing: list[str], visible: str) -> Row:
    library, bug = candidate.library, candidate.mutation
    return {
        "repo": f"embedded/{library.name}",
        "instance_id": "",
        "base_commit": "",
        "patch": make_diff(library.core_file, bug.source, library.core),
        "test_patch": make_diff(TEST_FILE, visible, library.tests),
        "problem_statement": _statement(library, bug, failing[0].partition("::")[2]),
        "hints_text": "",
        "created_at": "2020-01-01T00:00:00Z",
        "version": "1",
        "FAIL_TO_PASS": json.dumps(failing),
        "PASS_TO_PASS": json.dumps(passing),
        "environment_setup_commit": "",
    }


def _statement(library: Library, bug: Mutation, test: str) -> str:
    """What a user would report: the function, what it is for, and a case that goes wrong."""
    example = "\n".join(f"    {line}".rstrip() for line in library.test_body(test).splitlines())
    says = library.docstring(bug.symbol)
    doc = f"Its documentation says: {says}\n\n" if says else ""
    return (
        f"`{library.name}.{bug.symbol}` gives a wrong result\n\n{doc}"
        f"{REPORTED}\n\n{example}\n\n"
        f"{WANTED} in {library.core_file} and mend it. The tests need no change.\n"
    )


def _write(folder: Path, found: Sequence[Tried], file_format: str) -> dict[str, int]:
    """Number the instances, commit their files, and write the rows of each split."""
    trees: dict[str, dict[str, Mapping[str, str]]] = defaultdict(dict)
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
    others = 0  # of libraries that training shows
    for tried in found:
        assert tried.row is not None
        assert tried.files is not None
        library = tried.row["repo"].partition("/")[2]
        tried.row["instance_id"] = f"embedded__{library}-{len(trees[library]) + 1:03}"
        trees[library][tried.row["instance_id"]] = tried.files
        if library in UNSEEN:
            splits["valid_unseen"].append(tried.row)
        else:
            splits["valid_seen" if others % HELD_OUT == 1 else "train"].append(tried.row)
            others += 1
    commits: dict[str, str] = {}
    for library, files in trees.items():
        commits |= write_repository(folder / REPOSITORIES / f"embedded__{library}.git", files)
    for split, rows in splits.items():
        for row in rows:
            row["base_commit"] = commits[row["instance_id"]]
        path = folder / f"{split}.{file_format}"
        if file_format == "json":
            _write_json(path, rows)
        else:
            import datasets  # it takes a second, which most callers need not spend

            datasets.Dataset.from_list(rows).to_parquet(str(path))
    return {split: len(rows) for split, rows in splits.items()}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Make validated SWE instances.")
    parser.add_argument("--out", required=True, help="the folder to fill")
    parser.add_argument("--count", type=int, default=120, help="instances over all splits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most-edits", type=int, help="easy ones: of so few possible edits")
    parser.add_argument("--invented", action="store_true", help="functions made up at random")
    parser.add_argument("--workers", type=int, default=2, help="tests run at once")
    parser.add_argument("--format", choices=FORMATS, default="json")
    parser.add_argument("--sandbox", default="auto", help="auto, bubblewrap, docker or local")
    parser.add_argument("--image", help="for docker: one with git, python3 and pytest")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    manifest = generate_instances(
        given.out,
        count=given.count,
        seed=given.seed,
        most_edits=given.most_edits,
        invented=given.invented,
        sandbox=choose_sandbox(SweSettings(given.sandbox, allow_unsafe=True, image=given.image)),
        workers=given.workers,
        file_format=given.format,
    )
    logger.info("%s", json.dumps(manifest, indent=1))


if __name__ == "__main__":
    main()
