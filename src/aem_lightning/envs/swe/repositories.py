"""The files of a repository at a commit, from clones on this machine."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from aem_lightning.envs.swe.instances import Instance

# Nothing of the user's own git settings takes part; a clone may belong to somebody else.
GIT = ("git", "-c", "safe.directory=*", "-c", "gc.auto=0", "-c", "core.hooksPath=/dev/null")
IDENTITY = "aem <aem@example.invalid>"
DATE = "1577836800 +0000"


class Repositories:
    """Clones in a folder, as ``owner__name.git``, ``owner__name`` or ``owner/name``.

    Without the folder every instance needs an image.
    """

    def __init__(self, root: str | Path | None) -> None:
        self.root = None if root is None else Path(root).expanduser()

    def base(self, instance: Instance) -> bytes:
        """The files at the instance's base commit, as a tar archive; empty for an image.

        They are what git stores, byte for byte: ``git archive`` would turn line ends round and
        leave files out, as the repository's ``.gitattributes`` say.

        Raises:
            FileNotFoundError: There is no such clone.
            ValueError: The clone has no such commit.
        """
        if instance.image is not None:
            return b""
        clone = self.clone(instance.repo)
        listed = git("ls-tree", "-r", "-z", "--full-tree", instance.base_commit, cwd=clone)
        entries = [entry.partition(b"\t")[::2] for entry in listed.stdout.split(b"\0")[:-1]]
        files = [(*head.split(), path) for head, path in entries]
        blobs = b"".join(name + b"\n" for _, kind, name, _ in files if kind == b"blob")
        found = git("cat-file", "--batch", cwd=clone, stdin=blobs)
        why = (listed.stderr + found.stderr).decode(errors="replace").strip()
        if listed.returncode or found.returncode:
            raise ValueError(
                f"{instance.instance_id}: {clone} has no commit {instance.base_commit}, or not "
                f"all of its files ({why}). Type git fetch --unshallow --refetch in it"
            )
        contents, archive = io.BytesIO(found.stdout), io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w", errors="surrogateescape") as tar:
            for mode, kind, _, path in files:
                size = int(contents.readline().split()[-1]) if kind == b"blob" else 0
                data = contents.read(size + 1)[:size] if kind == b"blob" else b""
                _add(tar, path.decode(errors="surrogateescape"), mode, data)
        return archive.getvalue()

    def located(self, instance: Instance) -> Instance:
        """The instance as it is played: from its clone where there is one, else from its image.

        Tests of R2E-Gym are in its images alone.
        """
        if instance.image is None or instance.expected or self._find(instance.repo) is None:
            return instance
        return replace(instance, image=None)

    def _find(self, repo: str) -> Path | None:
        flat = repo.replace("/", "__")
        if self.root is not None:
            for name in (f"{flat}.git", flat, repo):
                if (self.root / name).is_dir():
                    return self.root / name
        return None

    def clone(self, repo: str) -> Path:
        """Where the clone of ``repo`` is.

        Raises:
            FileNotFoundError: There is none.
        """
        found = self._find(repo)
        if found is not None:
            return found
        flat = repo.replace("/", "__")
        raise FileNotFoundError(
            f"No clone of {repo} in datamodule.repositories={self.root}: type "
            f"git clone --bare https://github.com/{repo} {flat}.git there, or use a data set whose "
            "rows name an image"
        )


def _add(tar: tarfile.TarFile, path: str, mode: bytes, data: bytes) -> None:
    """A file as git lists it; of another repository inside this one, its folder."""
    entry = tarfile.TarInfo(path)
    entry.mode, entry.mtime = 0o755 if mode != b"100644" else 0o644, int(DATE.split()[0])
    if mode == b"120000":
        entry.type, entry.linkname = tarfile.SYMTYPE, data.decode(errors="surrogateescape")
    elif mode == b"160000":
        entry.type = tarfile.DIRTYPE
    else:
        entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def git(*arguments: str, cwd: Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """What git answers, with no settings of the user."""
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": "/nonexistent",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": "/dev/null",
    }
    return subprocess.run(
        [*GIT, *arguments], cwd=cwd, env=environment, input=stdin, capture_output=True, check=False
    )


def write_repository(folder: Path, commits: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """A bare repository with a commit without parents for each name; its hashes by name.

    Author and date are fixed, so equal files give equal hashes.
    """
    folder.mkdir(parents=True)
    for done in (
        git("init", "--quiet", "--bare", ".", cwd=folder),
        git("fast-import", "--quiet", cwd=folder, stdin=_stream(commits)),
    ):
        if done.returncode:
            raise RuntimeError(f"git failed in {folder}: {done.stderr.decode(errors='replace')}")
    listed = git("for-each-ref", "--format=%(refname:short) %(objectname)", cwd=folder)
    return dict(line.split() for line in listed.stdout.decode().splitlines())


def _stream(commits: Mapping[str, Mapping[str, str]]) -> bytes:
    parts = []
    for name, files in commits.items():
        head = f"commit refs/heads/{name}\ncommitter {IDENTITY} {DATE}\ndata 4\nbase\n"
        parts.append(head.encode())
        for path, text in sorted(files.items()):
            data = text.encode()
            parts.append(f"M 100644 inline {path}\ndata {len(data)}\n".encode() + data + b"\n")
    return b"".join(parts)
