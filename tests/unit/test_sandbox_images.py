"""Images, quotas and podman's words, with a ``docker`` that only notes what it is asked."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from aem_lightning.envs.swe import SweSettings, choose_sandbox
from aem_lightning.envs.swe.sandbox import DockerSandbox, Limits, SessionSpec, docker, images, quota
from aem_lightning.envs.swe.sandbox.quota import RootWatch, daemon_bounds_roots
from aem_lightning.envs.swe.validate import main

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
    monkeypatch.setattr(images, "FRESH_S", 0.0)
    docker._probe.cache_clear()
    yield tmp_path
    docker._probe.cache_clear()


def here(home: Path) -> list[str]:
    return sorted(place.name for place in (home / "here").iterdir())


def noted(home: Path) -> list[str]:
    (ledger,) = (home / ".cache" / "aem_lightning").glob("images_*.json")
    return sorted(json.loads(ledger.read_text()))


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., str]:
    """A file of rows, each with its image."""

    def write(*names: str) -> str:
        row = {"repo": "a/b", "base_commit": "0" * 40, "problem_statement": "It fails."}
        tests = {"FAIL_TO_PASS": '["t.py::t"]', "PASS_TO_PASS": "[]", "patch": "", "test_patch": ""}
        more = [{"instance_id": f"a__b-{n}", "image": name} for n, name in enumerate(names)]
        (tmp_path / "rows.json").write_text(json.dumps([row | tests | one for one in more]))
        return str(tmp_path / "rows.json")

    return write


def test_fetching_grades_or_forgets_to_name_what_is_lost(
    fake: Path, rows: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    (fake / "here" / "hosts_own:1").write_text("sha256:own 1")
    path = rows("a/one:1", "a/lost:2", "hosts/own:1", "a/one:1", "ghcr.io/a/two:3")
    assert main([path, "--pull-only", "--workers", "3"]) == 1
    assert here(fake) == ["a_one:1", "ghcr.io_a_two:3", "hosts_own:1"]
    assert noted(fake) == ["a/one:1", "ghcr.io/a/two:3"], "one that was there is not ours"
    assert "the image a/lost:2 cannot be pulled: no such thing" in caplog.text
    assert "3 of 4 images are here" in caplog.text
    assert "these are not: a/lost:2" in caplog.text
    calls = (fake / "calls").read_text()
    assert calls.count("pull docker.io/a/one:1\n") == calls.count("pull ghcr.io/a/two:3\n") == 1
    assert "run" not in calls
    with pytest.raises(SystemExit, match="2"):
        main([path, "--pull-only", "--images-gb", "9"])


def test_an_image_that_is_used_or_not_ours_is_removed(
    fake: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    (fake / "here" / "hosts:1").write_text("sha256:own 9000000000")
    for name in ("hosts:1", "a:1", "b:1", "c:1", "d:1"):
        assert images.pull(name, 9) is None
    (fake / "here" / "b:1").write_text("sha256:built_anew 3000000000")  # by somebody else
    (fake / "used" / "c:1").touch()
    assert images.pull("a:1", 9, most_gb=10) is None  # which is the last one used now
    assert images.pull("e:1", 9, most_gb=10) is None
    assert here(fake) == ["a:1", "b:1", "c:1", "e:1", "hosts:1"]
    assert noted(fake) == ["a:1", "c:1", "e:1"]
    assert "The image c:1 stays: a container is using it" in caplog.text
    assert "Removed the image d:1: those of our runs had 12.0 GB, and images_gb=10." in caplog.text


def test_an_image_goes_before_its_container_is_started(
    fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "FRESH_S", 60.0)
    for name in ("a:1", "b:1"):
        assert images.pull(name, 9, most_gb=1) is None
    assert here(fake) == ["a:1", "b:1"]


def test_what_many_pull_at_once_is_lost_from_the_ledger(fake: Path) -> None:
    names = [f"many:{number}" for number in range(12)]
    with ThreadPoolExecutor(6) as pool:
        assert {*pool.map(lambda name: images.pull(name, 9, most_gb=12), names)} == {None}
    assert noted(fake) == [name for name in sorted(names) if name in here(fake)]
    assert len(here(fake)) == 4


@pytest.mark.parametrize("said", ["", '{"a/one:1": {"id"', "\0" * 9])
def test_a_ledger_that_nobody_can_read_keeps_images_away(fake: Path, said: str) -> None:
    assert images.pull("a/one:1", 9.0, 50.0) is None
    (ledger,) = (fake / ".cache" / "aem_lightning").glob("images_*.json")
    ledger.write_text(said)
    assert images.pull("a/two:1", 9.0, 50.0) is None
    assert noted(fake) == ["a/two:1"]


def test_a_home_that_cannot_be_written_keeps_images_away(fake: Path) -> None:
    (fake / ".cache").touch()
    assert images.pull("a:1", 9) is None
    assert "cannot be pulled: [Errno" in str(images.pull("a:1", 9, most_gb=1))


def test_settings_of_images_do_not_reach_their_sandbox() -> None:
    sandbox = choose_sandbox(SweSettings("docker", images_gb=40.0), has_images=True)
    assert isinstance(sandbox, DockerSandbox)
    assert sandbox.images_gb == 40.0
    with pytest.raises(ValueError, match=r"--images-gb, and type .*images_gb=null"):
        SweSettings("remote", hosts=["http://a:1"], images_gb=40.0)


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
