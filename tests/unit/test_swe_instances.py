"""Instances: SWE-bench's and R2E-Gym's rows, files and data sets, and the embedded ones."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from aem_lightning.datamodules import SweDataModule
from aem_lightning.envs.swe import Grade, SweSettings, generate, load_instances
from aem_lightning.envs.swe.changes import file_changes
from aem_lightning.envs.swe.expert import words_fix
from aem_lightning.envs.swe.generate import Candidate, candidates, generate_instances
from aem_lightning.envs.swe.grading import GradedChange, graded_change
from aem_lightning.envs.swe.instances import SWEBENCH_COLUMNS, Instance, from_swebench
from aem_lightning.envs.swe.invention import CALLS, FUNCTIONS, invent
from aem_lightning.envs.swe.libraries import load_libraries
from aem_lightning.envs.swe.mutations import Mutation, functions, mutations
from aem_lightning.envs.swe.official import LEFT_OUT
from aem_lightning.envs.swe.patches import TOKEN, hunks, make_diff, reversed_diff, token_fix
from aem_lightning.envs.swe.repositories import Repositories, write_repository
from aem_lightning.envs.swe.sandbox import Limits, LocalSandbox, SessionSpec, tar_of
from aem_lightning.envs.swe.validate import main, validate_instance
from aem_lightning.envs.swe.words import swaps
from aem_lightning.envs.swe.worktree import apply

FIX = make_diff("m.py", "x = 1\n", "x = 2\n")
SPLITS = ("train", "valid_seen", "valid_unseen")


def load(path, tmp_path, source="json", **settings):
    return load_instances(source, str(path), cache_dir=str(tmp_path / "cache"), **settings)


@pytest.fixture
def rows(swe_root):
    return [row for split in SPLITS for row in json.loads((swe_root / f"{split}.json").read_text())]


def test_the_manifest_counts_something_else_than_the_files_hold(swe_root, rows):
    manifest = json.loads((swe_root / "manifest.json").read_text())
    assert manifest["outcomes"]["valid"] == len(rows) == 4
    assert manifest["sizes"] == {"train": 2, "valid_seen": 1, "valid_unseen": 1}


def test_an_embedded_row_is_not_in_swe_benchs_columns(rows):
    for row in rows:
        assert set(SWEBENCH_COLUMNS) < set(row)
        assert all(isinstance(value, str) for value in row.values())
        assert json.loads(row["FAIL_TO_PASS"])
        assert json.loads(row["PASS_TO_PASS"])


def test_a_statement_tells_the_hidden_tests_or_the_fix(rows):
    for row in rows:
        fixed = [line[1:].strip() for line in row["patch"].splitlines() if line.startswith("+ ")]
        assert fixed
        assert not any(line in row["problem_statement"] for line in fixed)
        for name in json.loads(row["FAIL_TO_PASS"]):
            assert name.partition("::")[2] not in row["problem_statement"]


def test_the_base_tree_holds_a_hidden_test_or_the_fix(swe_root, rows, tmp_path):
    for instance in [i for split in SPLITS for i in load(swe_root / f"{split}.json", tmp_path)]:
        tree = Repositories(swe_root / "repositories").base(instance).decode("latin-1")
        part = next(hunks(instance.patch))
        assert part.old in tree
        assert part.new not in tree
        assert not any(f"def {t.partition('::')[2]}(" in tree for t in instance.fail_to_pass)


def test_a_folder_that_is_there_is_made_again(swe_root):
    before = (swe_root / "train.json").stat().st_mtime_ns
    assert generate_instances(swe_root, count=99)["count"] == 4
    assert (swe_root / "train.json").stat().st_mtime_ns == before


def test_equal_files_give_another_commit(tmp_path):
    trees = {"one": {"a.py": "x = 1\n", "b/c.py": ""}, "two": {"a.py": "x = 2\n"}}
    first = write_repository(tmp_path / "first.git", trees)
    assert write_repository(tmp_path / "second.git", trees) == first
    assert len(set(first.values())) == 2


def test_a_mutation_changes_more_than_one_token_or_breaks_the_syntax():
    for library in load_libraries():
        found = list(mutations(library.core))
        assert len({bug.source for bug in found}) == len(found) > 20
        for bug in found:
            ast.parse(bug.source)
            fix = make_diff("core.py", bug.source, library.core)
            old, new = bug.source.splitlines(), library.core.splitlines()
            assert [n for n, (a, b) in enumerate(zip(old, new, strict=True), 1) if a != b] == [
                bug.line
            ]
            said = token_fix(fix)
            if said is not None:
                assert (said.line, said.old, said.new) == (bug.line, bug.new, bug.old)
            else:
                assert TOKEN.findall(old[bug.line - 1]).count(bug.new) != 1


def test_the_first_candidates_are_of_one_library_or_hang_on_something_else_than_the_seed():
    first = [one.library.name for one in candidates(0)[:8]]
    assert len(set(first)) == 8
    assert candidates(0) == candidates(0) != candidates(1)


def test_an_easy_bug_can_be_edited_in_many_ways_and_not_mended():
    easy = candidates(0, most_edits=4)
    assert 40 < len(easy) < len(candidates(0))
    for each in easy:
        bug = each.mutation
        function = dict(functions(ast.parse(bug.source)))[bug.symbol]
        lines = bug.source.splitlines()[function.lineno - 1 : function.end_lineno]
        assert sum(len(swaps(line)) for line in lines) <= 4
        assert (bug.new, bug.old) in swaps(bug.source.splitlines()[bug.line - 1])


@pytest.mark.parametrize("number", range(3))
def test_a_bug_of_an_invented_function_passes_its_test(number):
    library = invent(0, number)
    assert library == invent(0, number) != invent(1, number)
    found = list(mutations(library.core))
    assert len({bug.symbol for bug in found}) == FUNCTIONS
    assert library.tests.count("assert") == CALLS * FUNCTIONS
    _run_tests(library.core, library)
    for bug in found:
        with pytest.raises((AssertionError, ArithmeticError, LookupError)):
            _run_tests(bug.source, library, bug.symbol)


def _run_tests(core, library, *symbols):
    space = {}
    exec(core, space)
    for symbol in symbols or [name for name, _ in functions(ast.parse(core))]:
        exec(library.test_body(f"test_{symbol}"), dict(space))


def test_a_function_is_invented_twice_or_has_two_bugs():
    libraries = [invent(0, number) for number in range(60)]
    bodies = [part for one in libraries for part in one.core.split("\n\n\ndef ")[1:]]
    assert len(bodies) == 60 * FUNCTIONS
    assert len(set(bodies)) > 0.99 * len(bodies)
    chosen = [one.mutation for one in candidates(0, 8, libraries)]
    assert len({(bug.source, bug.symbol) for bug in chosen}) == len(chosen) > 5 * 60
    kinds = {(bug.old, bug.new) for bug in chosen}
    assert {("<", "<="), ("+", "-"), ("min", "max"), ("and", "or"), ("+=", "-=")} <= kinds


def test_what_is_told_of_an_invented_bug_is_not_what_its_tests_say():
    library, sandbox = invent(0, 0), LocalSandbox(allow_unsafe=True)
    for candidate in candidates(0, 8, [library])[:2]:
        tried = generate.try_candidate(sandbox, candidate)
        assert tried.outcome == "valid"
        assert generate.told_candidate(candidate) == tried


def test_an_endless_bug_is_an_instance(monkeypatch):
    monkeypatch.setattr(generate, "TRIAL", Limits(wall_s=60.0, cpu_s=1))
    library = load_libraries()[0]
    bug = Mutation("put", 1, "", "", f"while True:\n    pass\n{library.core}")
    tried = generate.try_candidate(LocalSandbox(allow_unsafe=True), Candidate(library, bug))
    assert tried.outcome == "timeout"


@pytest.mark.parametrize("kind", ["parquet", "hub"])
def test_the_same_rows_from_elsewhere_are_other_instances(kind, swe_root, tmp_path):
    expected = load(swe_root / "train.json", tmp_path)
    folder = tmp_path / "data"
    folder.mkdir()
    rows = json.loads((swe_root / "train.json").read_text())
    file = folder / "train.parquet"
    datasets.Dataset.from_list(rows).to_parquet(str(file))
    path = file if kind == "parquet" else folder  # datasets reads a folder like a hub repository
    assert load(path, tmp_path, source=kind, split="train") == expected


def test_a_row_of_r2e_gym_is_not_an_image_with_expected_statuses(tmp_path):
    row = {
        "docker_image": "names/orange_final:abc123",
        "repo_name": "orange",
        "expected_output_json": json.dumps({"TestA.test_b": "PASSED"}),
        "problem_statement": "It fails.",
        "parsed_commit_content": "{}",
    }
    path = tmp_path / "r2e.json"
    path.write_text(json.dumps([row]))
    (instance,) = load(path, tmp_path)
    assert instance.instance_id == "orange__abc123"
    assert instance.image == row["docker_image"]
    assert instance.expected == {"TestA.test_b": "PASSED"}
    assert instance.task("train").type == "orange"


def test_a_row_without_a_column_does_not_say_which(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"instance_id": "a", "repo": "b"}]))
    with pytest.raises(ValueError, match=r"A row has no base_commit, patch, .*adapter=swebench"):
        load(path, tmp_path)


def test_a_missing_file_does_not_say_how_to_play_without(tmp_path):
    with pytest.raises(FileNotFoundError, match="datamodule=swe_embedded"):
        load(tmp_path / "none.json", tmp_path)


def test_a_row_that_cannot_be_played_takes_the_others_with_it(swe_root, tmp_path, caplog):
    rows = json.loads((swe_root / "train.json").read_text())
    path = tmp_path / "rows.json"
    empty = rows[1] | {"instance_id": "no_tests", "FAIL_TO_PASS": "[]"}
    path.write_text(json.dumps([rows[0], rows[1], rows[0] | {"patch": ""}, empty]))
    assert load(path, tmp_path) == load(swe_root / "train.json", tmp_path)
    assert "no_tests: FAIL_TO_PASS is empty, so doing nothing would resolve it" in caplog.text
    assert f"{rows[0]['instance_id']} is given more than once: the first is kept" in caplog.text


BUG = """diff --git a/m.py b/m.py
index 1..2 100644
--- a/m.py
+++ b/m.py
@@ -1,3 +1,2 @@
 a
--- old
-b
+++ new
\\ No newline at end of file
diff --git a/gone.py b/gone.py
deleted file mode 100644
--- a/gone.py
+++ /dev/null
@@ -1 +0,0 @@
-x
"""
PLAIN = {
    "repo": "farm/pens",
    "instance_id": "Farm__pens-1",
    "base_commit": "0" * 40,
    "problem_statement": "It fails.",
    "patch": FIX,
    "test_patch": "tests",
    "FAIL_TO_PASS": ["t.py::a"],
    "PASS_TO_PASS": "[]",
}
SMITH = {"test_patch": None, "image_name": "jyangballin/swesmith.x86_64.a_1776_b.12", "patch": BUG}
PRO = {
    "fail_to_pass": "['t.py::a', \"t.py::b[it's]\"]",
    "pass_to_pass": "[]",
    "FAIL_TO_PASS": None,
    "dockerhub_tag": "a.b-1",
    "requirements": "- r",
    "interface": "i()",
}


@pytest.mark.parametrize(
    ("columns", "read"),
    [
        ({}, {"image": None, "patch": FIX, "fail_to_pass": ("t.py::a",), "pass_to_pass": ()}),
        ({"PASS_TO_PASS": "", "patch": None}, {"pass_to_pass": (), "patch": ""}),
        (
            {"repo": "Pallets/flask", "eval_script": "true", "image": None},
            {"image": "swebench/sweb.eval.x86_64.farm_1776_pens-1:latest", "eval_script": "true"},
        ),
        (
            {"repo": "Project-MONAI/MONAI"},
            {"image": "xingyaoww/sweb.eval.x86_64.farm_s_pens-1:latest"},
        ),
        (
            {"install_config": {"test_cmd": "pytest"}, "FAIL_TO_FAIL": []},
            {"image": "swerebench/sweb.eval.x86_64.farm_1776_pens-1:latest"},
        ),
        ({"docker_image": "swerebench/x", "install_config": {}}, {"image": "swerebench/x"}),
        (SMITH, {"setup_patch": BUG, "patch": reversed_diff(BUG), "test_patch": ""}),
        (
            PRO,
            {
                "fail_to_pass": ("t.py::a", "t.py::b[it's]"),
                "image": "jefzda/sweap-images:a.b-1",
                "workdir": "/app",
                "problem_statement": "It fails.\n\nRequirements:\n- r"
                "\n\nNew interfaces introduced:\ni()",
            },
        ),
    ],
)
def test_a_row_of_another_data_set_is_read_as_something_else(columns, read):
    instance = from_swebench(PLAIN | columns)
    assert {name: getattr(instance, name) for name in read} == read


@pytest.mark.parametrize("said", ["t.py::a", "{'t.py::a': 1}", "[1]", "[", 7, {"a": 1}])
def test_what_is_no_list_of_tests_is_read(said):
    with pytest.raises(ValueError, match=r"Farm__pens-1: PASS_TO_PASS=.* is no list of test names"):
        from_swebench(PLAIN | {"PASS_TO_PASS": said})


def test_a_reversed_diff_brings_back_something_else():
    buggy = LocalSandbox(allow_unsafe=True).open(SessionSpec())
    files = {"m.py": b"a\n-- old\nb\n", "gone.py": b"x\n"}
    buggy.put_tar(tar_of(files))
    assert apply(buggy, BUG).code == 0
    assert buggy.run("cat m.py; ls").output == "a\n++ newm.py\n"
    assert apply(buggy, reversed_diff(BUG)).code == 0
    assert buggy.run("cat m.py gone.py").output == "a\n-- old\nb\nx\n"
    buggy.close()
    assert file_changes(reversed_diff(BUG))[1].is_new


REAL = Path(__file__).parents[3] / "shared" / "real" / "swe"


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no genuine rows in {REAL}")
def test_genuine_rows_are_not_read_or_their_fixes_are_refused(tmp_path):
    classic, release = (
        load(REAL / f"flask_rows_{n}.json", tmp_path) for n in ("classic", "release5")
    )
    assert [i.image for i in classic] == [
        i.image.removesuffix(":latest") + ":latest" for i in release
    ]
    assert all(i.eval_script for i in release)
    for instance in (*classic, *release, *load(REAL / "swe-bench-lite-test.json", tmp_path)):
        change = graded_change(instance, instance.patch, LEFT_OUT)
        assert isinstance(change, GradedChange), (instance.instance_id, change)
        assert change.diff == instance.patch, "all of it is graded"


# ------------------------------------------------------------------------------------- gold first


def test_a_row_whose_fix_fails_is_played_or_graded_again(swe_root, tmp_path, monkeypatch, caplog):
    rows = json.loads((swe_root / "train.json").read_text())
    far = rows[0] | {"instance_id": "far_away", "base_commit": "0" * 40}
    wrong = rows[1] | {"instance_id": "wrong", "patch": rows[0]["patch"]}
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([rows[0], far, wrong]))

    def datamodule(file=path):
        settings = {"sandbox": "local", "allow_unsafe": True}
        return SweDataModule(
            str(tmp_path),
            source="json",
            splits={"train": str(file)},
            evaluation_splits=["train"],
            environment=settings | {"repositories": str(swe_root / "repositories")},
        )

    data = datamodule()
    data.prepare_data()
    assert [task.id for task in data.tasks("train")] == [rows[0]["instance_id"]]
    assert "2 of 3 rows are left out" in caplog.text
    assert "far_away: far_away: " in caplog.text
    assert "wrong: its fix earns 0: the change does not apply" in caplog.text

    graded = []
    monkeypatch.setattr(
        "aem_lightning.envs.swe.validate.grade_change", lambda *given: graded.append(given)
    )
    again = datamodule()
    again.prepare_data()
    assert (again.tasks("train"), graded) == (data.tasks("train"), [])
    path.write_text(json.dumps([wrong]))
    with pytest.raises(ValueError, match=r"no row earns 1 .* type datamodule.validate=false"):
        datamodule().tasks("train")


@pytest.mark.parametrize(
    ("grades", "problem"),
    [
        ({True: Grade(True), False: Grade()}, ""),
        ({True: Grade(True), False: Grade(True)}, "doing nothing earns 1"),
        (
            {True: Grade(report="E   socket.gaierror: Temporary failure in name resolution")},
            "its fix earns 0: its tests need the network; E   socket",
        ),
        (
            {True: Grade(report="E   ModuleNotFoundError: No module named 'yaml'")},
            "its fix earns 0: its environment does not import; E   Module",
        ),
        ({True: Grade(why="no test was run: ")}, "its fix earns 0: no test was run"),
        ({True: Grade(infra_error="the sandbox ended")}, "the sandbox ended"),
    ],
)
def test_a_verdict_says_something_else(grades, problem, monkeypatch):
    monkeypatch.setattr(
        "aem_lightning.envs.swe.validate.grade_change", lambda *given: grades[bool(given[-1])]
    )
    instance = replace(from_swebench(PLAIN), image="some/image")
    verdict = validate_instance(LocalSandbox(True), SweSettings(), instance)
    assert verdict.problem.startswith(problem)
    assert bool(verdict.problem) == bool(problem)
    assert verdict.is_final == (problem != "the sandbox ended")
    files = replace(instance, image=None, repo="a/b")
    monkeypatch.setattr(Repositories, "base", lambda *given: b"")
    found = validate_instance(LocalSandbox(True), SweSettings(), files)
    assert found.is_final == (verdict.is_final and "does not import" not in problem)
    monkeypatch.setattr("aem_lightning.envs.swe.validate.JUDGE", "another release's")
    assert validate_instance(LocalSandbox(True), SweSettings(), files).key != found.key


def test_the_command_grades_nothing_or_forgets_what_failed(swe_root, tmp_path, caplog):
    caplog.set_level("INFO")
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([json.loads((swe_root / "train.json").read_text())[0]]))
    where = ["--repositories", str(swe_root / "repositories"), "--sandbox", "local"]
    assert main([str(path), *where, "--allow-unsafe"]) == 0
    assert "1 of 1 can be played" in caplog.text
    assert (tmp_path / "verdicts.jsonl").is_file()


def test_a_missing_clone_does_not_say_what_to_type(tmp_path):
    instance = Instance("a__b-1", "a/b", "0" * 40, "It fails.")
    with pytest.raises(
        FileNotFoundError, match=r"git clone --bare https://github\.com/a/b a__b\.git"
    ):
        Repositories(tmp_path).base(instance)


def test_a_fix_of_more_than_one_token_can_be_said_in_words():
    two = make_diff("a.py", "x = 1 + 2\n", "x = 3 - 2\n")
    far = make_diff("a.py", "x = 1\n", "x = 3\n")
    assert token_fix(two) is None
    assert words_fix(Instance("a", "b", "c", "d", patch=far)) is None
    near = make_diff("a.py", "x = 1\n", "x = 2\n")
    assert words_fix(Instance("a", "b", "c", "d", patch=near)) == token_fix(near)
