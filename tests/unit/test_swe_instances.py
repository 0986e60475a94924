"""Instances: SWE-bench's and R2E-Gym's rows, files and data sets, and the embedded ones."""

from __future__ import annotations

import ast
import json

import datasets
import pytest

from aem_lightning.envs.swe import generate, load_instances
from aem_lightning.envs.swe.expert import words_fix
from aem_lightning.envs.swe.generate import Candidate, candidates, generate_instances
from aem_lightning.envs.swe.instances import SWEBENCH_COLUMNS, Instance
from aem_lightning.envs.swe.libraries import load_libraries
from aem_lightning.envs.swe.mutations import Mutation, mutations
from aem_lightning.envs.swe.patches import TOKEN, hunks, make_diff, token_fix
from aem_lightning.envs.swe.repositories import Repositories, write_repository
from aem_lightning.envs.swe.sandbox import Limits, LocalSandbox

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


def test_an_id_given_twice_is_taken(swe_root, tmp_path):
    rows = json.loads((swe_root / "train.json").read_text())
    path = tmp_path / "twice.json"
    path.write_text(json.dumps([rows[0], rows[0]]))
    with pytest.raises(ValueError, match="given more than once"):
        load(path, tmp_path)


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
