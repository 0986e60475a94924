"""Images, quotas and podman's words, with a ``docker`` that only notes what it is asked."""

from __future__ import annotations

import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aem_lightning.envs.swe.sandbox import DockerSandbox, Limits, SessionSpec, docker, quota
from aem_lightning.envs.swe.sandbox.quota import RootWatch, daemon_bounds_roots

# An image is a file in HOME/here, with id and size; one that is used has a file in HOME/used.
FAKE = """#!/bin/sh
echo "$@" >> "$HOME/calls"
for last; do :; done
name=$(echo "${last#docker.io/}" | tr / _)
case "$1 $2" in
"version "*) echo 27.0;;
"--version "*) echo "${0##*/} version 27.0";;
"pull "*)
    case $last in *lost*) echo "no such thing"; exit 1;; esac
    echo "sha256:$name 3000000000" > "$HOME/here/$name";;
"image inspect")
    [ -e "$HOME/here/$name" ] || exit 1
    read -r id size < "$HOME/here/$name"
    case $4 in *Size*) echo "$id $size";; *) echo "$id";; esac;;
"image rm")
    if [ -e "$HOME/used/$name" ]; then echo "a container is using it" >&2; exit 1; fi
    rm "$HOME/here/$name";;
"container inspect") cat "$HOME/written";;
"info "*) cat "$HOME/driver";;
"create "*) [ -e "$HOME/pquota" ] && echo made;;
"run "*)
    while [ "$1" != -I ]; do shift; done
    cd "$HOME" && exec python3 "$@";;
esac
"""


@pytest.fixture(params=["docker"])
def fake(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """HOME, with a program of that name on PATH."""
    binary = tmp_path / "bin" / request.param
    for folder in (binary.parent, tmp_path / "here", tmp_path / "used"):
        folder.mkdir()
    binary.write_text(FAKE)
    binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: str(binary) if name == binary.name else None)
    docker._probe.cache_clear()
    yield tmp_path
    docker._probe.cache_clear()


def test_a_root_folder_may_grow_for_ever(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota, "LOOK_S", (0.1, 0.2))
    (fake / "written").write_text("5000\n")
    (fake / "driver").write_text("overlay2\n")
    limits = Limits(disk_bytes=10_000)
    session = DockerSandbox("a:1", writable_root=True).open(SessionSpec(str(fake), limits))
    assert session.run("sleep 0.3").code == 0
    (fake / "written").write_text("20000\n")
    result = session.run("sleep 30")
    assert (result.code, result.seconds < 5, session.alive()) == (137, True, False)
    assert "wrote 20000 bytes into its root folder, and may write 10000" in str(result.infra_error)
    assert "datamodule.environment.limits.disk_bytes" in str(result.infra_error)


def test_looks_are_as_many_as_commands(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    (fake / "written").write_text("0\n")
    for most_bytes, looks in ((1 << 20, 10), (4 << 30, 5)):
        (fake / "calls").unlink(missing_ok=True)
        watch = RootWatch("name", most_bytes)
        for _ in range(40):
            now[0] += 60  # the agent thinks for a minute, and its command is short
            assert watch() is None
        assert (fake / "calls").read_text().count("--size") == looks


@pytest.mark.parametrize(
    ("driver", "has_quotas", "bounds"),
    [("overlay2", True, True), ("overlay2", False, False), ("overlayfs", True, False)],
)
def test_a_daemon_that_takes_a_size_is_not_given_one(
    fake: Path, driver: str, has_quotas: bool, bounds: bool
) -> None:
    (fake / "driver").write_text(driver)
    if has_quotas:
        (fake / "pquota").touch()
    assert daemon_bounds_roots("a:1") == bounds
    session = DockerSandbox("a:1", writable_root=True).open(SessionSpec(str(fake)))
    session.run("true")
    session.close()
    calls = (fake / "calls").read_text()
    assert ("\nrun --storage-opt size=268435456 --rm " in calls) == bounds


@pytest.mark.parametrize("fake", ["podman"], indirect=True)
def test_podman_is_asked_for_what_it_does_not_know(fake: Path) -> None:
    sandbox = DockerSandbox("a:1")
    assert "podman 27.0" in sandbox.probe().reason
    words = sandbox.arguments(SessionSpec("/testbed"), "name")
    assert "--tmpfs" not in words
    assert "--read-only-tmpfs=false" in words
    folders = [words[at + 1] for at, word in enumerate(words) if word == "--mount"]
    assert [folder.split(",")[1] for folder in folders] == ["dst=/tmp", "dst=/testbed"]
    assert all(f"o=size={256 << 20},nr_inodes=100000,mode=" in folder for folder in folders)
