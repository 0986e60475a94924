"""Diffs as git writes and applies them, and texts that only look like it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from aem_lightning.envs.swe.changes import DiffError, file_changes, text_of


def git(folder: Path, *arguments: str, stdin: str = "") -> str:
    quiet = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    done = subprocess.run(
        command, cwd=folder, input=stdin.encode(), capture_output=True, env=os.environ | quiet
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    for path, text in {
        "plain.py": "a\nb\nc\n",
        "with blank.py": "a\n",
        "caf\u00e9.py": "a\n",
        "no end.py": "a",
        "moved.py": "line\n" * 30,
        "mode.py": "a\n",
        "gone.py": "a\n-- x\n",
        "binary.dat": "\x00\x01",
    }.items():
        (tmp_path / path).write_text(text)
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "base")
    (tmp_path / "plain.py").write_text("a\n++ b\n-- c\n\n\x0cd\r\n\u2028e\n")
    (tmp_path / "with blank.py").write_text("b\n")
    (tmp_path / "caf\u00e9.py").write_text("b\n")
    (tmp_path / "no end.py").write_text("b")
    (tmp_path / "moved.py").rename(tmp_path / "there.py")
    (tmp_path / "mode.py").chmod(0o755)
    (tmp_path / "gone.py").unlink()
    (tmp_path / "empty.py").touch()
    (tmp_path / "binary.dat").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "link").symlink_to("plain.py")
    git(tmp_path, "add", "-A")
    return tmp_path


@pytest.mark.parametrize(
    "options", [[], ["--binary"], ["--no-renames"], ["-U0"], ["--binary", "-M"]]
)
def test_what_git_writes_is_read_otherwise(repository: Path, options: list[str]) -> None:
    diff = git(repository, "diff", "--cached", *options)
    parts = file_changes(diff)
    named = git(repository, "diff", "--cached", "--name-only", "-z", *options[-1:]).split("\0")[:-1]
    assert {part.paths[-1] for part in parts} == set(named)
    assert text_of(parts) == diff, "what is handed on is what was read"
    assert text_of(file_changes("warning: CRLF\n" + diff)) == diff
    (plain,) = [part for part in parts if part.paths == ("plain.py",)]
    assert plain.added[-5:] == ("++ b", "-- c", "", "\x0cd\r", "\u2028e")
    (binary,) = [part for part in parts if part.binary]
    assert (binary.paths, binary.complete) == (("binary.dat",), "--binary" in options)


def test_what_is_read_does_not_apply(
    repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    diff = git(repository, "diff", "--cached", "--binary")
    wanted = git(repository, "write-tree")
    git(repository, "reset", "-q", "--hard")
    git(repository, "apply", "--index", "-", stdin=text_of(file_changes(diff)))
    assert git(repository, "write-tree") == wanted


HEAD = "diff --git a/m.py b/m.py\n--- a/m.py\n+++ b/m.py\n"
HUNK = "@@ -1 +1 @@\n-a\n+b\n"


@pytest.mark.parametrize(
    "diff",
    [
        HEAD + HUNK + "--- a/x.py\n+++ b/x.py\n" + HUNK,
        HEAD + HUNK + "+more\n",
        HEAD + HUNK + "\nwords\n" + HUNK,
        HEAD + "@@ -1 +1,3 @@\n-a\n+b\n",
        HEAD + "@@ -1 +1 @@\n-a\n-a\n+b\n",
        HEAD + "@@ -1 +1 @@\n*a\n+b\n",
        HEAD.replace("+++ b/m.py", "+++ m.py") + HUNK,
        HEAD.replace("+++ b/m.py", '+++ "b/m.py') + HUNK,
        "diff --git a/m.py b/m.py\n" + HUNK,
        "diff --git a/m.py b/other.py\nold mode 100644\nnew mode 100755\n",
        "diff --git m.py m.py\nold mode 100644\nnew mode 100755\n",
        "diff --git a/x b/x\nGIT binary patch\nliteral 1\nIc${MZ000310RRC2\n\n--- a/y\n+++ b/y\n",
        "diff --git a/m.py b/m.py\nrename from m.py\n+++ b/m.py\n--- a/m.py\n",
    ],
)
def test_what_git_does_not_write_is_read(diff: str) -> None:
    with pytest.raises(DiffError):
        file_changes(diff)


def test_a_name_in_octal_is_another_than_the_same_in_letters() -> None:
    head = 'diff --git "a/caf\\303\\251 \\"1\\".py" "b/caf\\303\\251 \\"1\\".py"\nold mode 1\n'
    assert file_changes(head)[0].paths == ('caf\u00e9 "1".py',)
    assert file_changes(head.replace("\\303\\251", "\u00e9"))[0].paths == ('caf\u00e9 "1".py',)


def test_nothing_is_something() -> None:
    assert file_changes("") == file_changes("\n") == file_changes("fatal: no repository\n") == ()
