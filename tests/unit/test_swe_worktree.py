"""A change on its way from the agent's sandbox to the one that grades: no byte of it is lost."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from aem_lightning.envs.swe import worktree
from aem_lightning.envs.swe.changes import diff_bytes, diff_text, file_changes
from aem_lightning.envs.swe.instances import Instance
from aem_lightning.envs.swe.repositories import Repositories
from aem_lightning.envs.swe.sandbox import LocalSandbox, SessionSpec
from aem_lightning.envs.swe.worktree import apply, commit_base, read_change

ATTRIBUTES = """* text=auto
*.bat text eol=crlf
*.wide working-tree-encoding=UTF-16
*.id ident
*.blob -diff
left.out export-ignore
subst export-subst
"""
FILES = {
    "latin.py": b"# coding: latin-1\nx = '\xfc'\n",
    "dos.py": b"a = 0\r\nb = 1\r\n",
    "mixed.py": b"a = 0\r\nb = 1\nc = 2\r\n",
    "mac.py": b"a = 0\rb = 1\r",
    "feed.py": b"a = 0\n\x0c\nb = '\xe2\x80\xa8'\n",
    "unix.bat": b"a\nb\n",
    "dos.bat": b"a\r\nb\r\n",
    "name.wide": b"plain\n",
    "a.id": b"$Id$\n",
    "a.blob": b"text\n",
    "nul.dat": b"a\0b\n",
    "left.out": b"here\n",
    "subst": b"$Format:%h$\n",
    'caf\u00e9 "1".py': b"a\n",
    "deep/no end.py": b"a = 1",
}


def test_a_byte_is_lost_on_the_way_of_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = tmp_path / "farm__pens"
    for path, data in FILES.items():
        (clone / path).parent.mkdir(parents=True, exist_ok=True)
        (clone / path).write_bytes(data)
    (clone / "link").symlink_to("dos.py")

    def git(*arguments: str, stdin: bytes = b"") -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        done = subprocess.run(command, cwd=clone, input=stdin, capture_output=True, check=True)
        return done.stdout.decode().strip()

    git("init", "-q", ".")
    git("add", "-A")  # as they are: the attributes come later
    (clone / ".gitattributes").write_text(ATTRIBUTES)
    git("add", ".gitattributes")
    git("commit", "-qm", "base")
    commit = git("rev-parse", "HEAD")
    base = Repositories(tmp_path).base(Instance("a", "farm/pens", commit, "it fails"))

    with_edits = LocalSandbox(True).open(SessionSpec())
    graded = LocalSandbox(True).open(SessionSpec())
    try:
        for session in (with_edits, graded):
            assert session.put_tar(base).code == 0
        made = commit_base(with_edits, ignored_too=True)
        hash_of_base = made.output.strip()[-40:]
        for path, data in FILES.items():
            assert graded.run(f"cat '{path}'").data == data, "what git stores, byte for byte"
        edit = "for f in *.* subst 'deep/no end.py'; do printf 'z\\374\r\n' >> \"$f\"; done"
        assert (
            with_edits.run(f"{edit}; printf 'new\\r\\n' > new.bat; ln -sf feed.py link").code == 0
        )
        change = read_change(with_edits, hash_of_base)
        assert (change.problem, change.left_out) == ("", ())
        assert diff_text(diff_bytes(change.diff)) == change.diff
        paths = {path for part in file_changes(change.diff) for path in part.paths}
        assert paths == {*FILES, "new.bat", "link"}
        applied = apply(graded, change.diff)
        assert applied.code == 0, applied.output
        listing = "find . -path ./.git -prune -o -type f -print0 | sort -z | xargs -0 sha1sum; "
        look = listing + "readlink link"
        assert graded.run(look).output == with_edits.run(look).output
        monkeypatch.setattr(worktree, "DIFF_BYTES", 400)
        assert read_change(with_edits, hash_of_base).problem == "the change is over 0 MiB"
        with_edits.run("git checkout -q .; seq 300 > new.bat")
        some = read_change(with_edits, hash_of_base)
        assert (some.problem, some.left_out) == ("", ("new files: the change is over 0 MiB",))
    finally:
        with_edits.close()
        graded.close()
