"""What holds for every sandbox, with and without walls."""

from __future__ import annotations

import json
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from aem_lightning.envs.swe.sandbox import (
    BubblewrapSandbox,
    DockerSandbox,
    Limits,
    LocalSandbox,
    Sandbox,
    Session,
    SessionSpec,
    docker,
    tar_of,
)


def sandboxes() -> list[object]:
    isolation = BubblewrapSandbox().probe()
    skipped = pytest.mark.skipif(not isolation.usable, reason=isolation.reason)
    return [
        pytest.param(LocalSandbox(allow_unsafe=True), id="local"),
        pytest.param(BubblewrapSandbox(), id="bubblewrap", marks=skipped),
    ]


@pytest.fixture(params=sandboxes())
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def session(sandbox: Sandbox) -> Iterator[Session]:
    opened = sandbox.open(SessionSpec(limits=Limits(wall_s=20, output_bytes=1000)))
    yield opened
    opened.close()


def test_a_command_has_no_result(session: Session) -> None:
    result = session.run("echo out; echo err >&2; exit 3")
    assert (result.code, result.output) == (3, "out\nerr\n")
    assert not result.timed_out
    assert not result.truncated
    assert result.infra_error is None


def test_files_do_not_last_from_one_command_to_the_next(session: Session) -> None:
    session.run("mkdir deep && echo 1 > deep/a")
    assert session.put_tar(tar_of({"deep/b": b"2\n"})).code == 0
    assert session.put_tar(tar_of({"c": b"3\n"}), "/testbed/deep").code == 0
    assert session.run("cat deep/a deep/b deep/c").output == "1\n2\n3\n"
    assert session.run("cat a b c", cwd="/testbed/deep").output == "1\n2\n3\n"


def test_input_is_cut(session: Session) -> None:
    assert session.run("wc -c", stdin=b"x" * 3_000_000).output.strip() == "3000000"
    assert session.run("true", stdin=b"x" * 3_000_000).code == 0


def test_a_sleeper_outlives_its_limit(session: Session) -> None:
    start = time.monotonic()
    result = session.run("echo begun; sleep 60", wall_s=2)
    assert time.monotonic() - start < 10
    assert (result.code, result.timed_out, result.output) == (124, True, "begun\n")
    assert session.run("echo next").output == "next\n"


def test_a_daemon_outlives_its_command(session: Session) -> None:
    session.run("setsid sleep 1234 & nohup sleep 1234 & (sleep 1234 &) ; disown -a; echo")
    assert "1234" not in session.run("cat /proc/[0-9]*/cmdline | tr '\\0' ' '").output


def test_a_flood_fills_memory(session: Session) -> None:
    result = session.run("echo first; yes | head -c 30000000; echo last")
    assert result.truncated
    assert len(result.output) < 1100
    assert result.output.startswith("first\ny\n")
    assert result.output.endswith("y\nlast\n")
    assert "bytes left out" in result.output


def test_bytes_that_are_no_text_end_the_session(session: Session) -> None:
    assert session.run("printf '\\xff\\x00ok'").output == "\ufffd\x00ok"


def test_a_folder_that_is_not_there_ends_the_session(session: Session) -> None:
    result = session.run("true", cwd="/no/such/place")
    assert result.code == 126
    assert "/no/such/place" in result.output
    assert session.run("echo next").output == "next\n"


@pytest.mark.parametrize(
    ("command", "said"),
    [("echo \0", "can hold no NUL character"), ("echo \ud800", "can hold no surrogate")],
)
def test_a_command_that_is_no_text_ends_the_session(
    session: Session, command: str, said: str
) -> None:
    result = session.run(command)
    assert (result.code, result.infra_error) == (126, None)
    assert said in result.output
    assert session.run("echo next").output == "next\n"


def test_a_limit_of_processor_time_is_not_told(sandbox: Sandbox) -> None:
    session = sandbox.open(SessionSpec(limits=Limits(cpu_s=1)))
    assert "[killed: over 1 seconds of processor time]" in session.run("while :; do :; done").output
    assert session.run("kill -9 $$").output == ""
    session.close()


def test_a_closed_session_raises(session: Session) -> None:
    assert session.alive()
    session.close()
    session.close()
    assert not session.alive()
    result = session.run("true")
    assert (result.code, result.infra_error) == (137, "the sandbox is closed")


def test_a_sandbox_that_dies_raises(sandbox: Sandbox) -> None:
    session = sandbox.open(SessionSpec())
    assert session.run("true").code == 0
    for child in psutil.Process().children():
        if "requests = os.fdopen" in " ".join(child.cmdline()):
            child.kill()
    result = session.run("true")
    assert result.code == 137
    assert "sandbox" in str(result.infra_error)
    assert not session.alive()
    session.close()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def of_ours(before: int, mark: str) -> int:
    """How many processes came: children, and whoever bears the mark, wherever they hang now."""
    marked = [p for p in psutil.process_iter(["cmdline"]) if mark in (p.info["cmdline"] or ())]
    return len(psutil.Process().children(recursive=True)) - before + len(marked)


def left_behind(before: tuple[int, int], mark: str, folder: Path) -> list[str]:
    """What is there now and was not, given a moment to end."""
    descriptors, processes = before
    end = time.monotonic() + 5
    while of_ours(processes, mark) and time.monotonic() < end:
        time.sleep(0.01)
    found = ["a process"] * of_ours(processes, mark)
    found += ["a descriptor"] * (open_files() - descriptors)
    return [*found, *os.listdir(folder)]


@pytest.mark.parametrize("episodes", [20, pytest.param(1000, marks=pytest.mark.soak)])
def test_episodes_leave_something_behind(
    sandbox: Sandbox, episodes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    sandbox.open(SessionSpec()).close()
    before = open_files(), len(psutil.Process().children(recursive=True))
    mark = str(50_000 + os.getpid() % 10_000)  # seconds that nothing else sleeps
    for number in range(episodes):
        session = sandbox.open(SessionSpec())
        assert session.put_tar(tar_of({"a": b"x"})).code == 0
        assert session.run(f"setsid sleep {mark} & cat a").output == "x"
        if number % 2:
            session.close()
        del session  # forgetting to close is no leak either
    assert left_behind(before, mark, tmp_path) == []


# ---------------------------------------------------------------------------------------- docker

FAKE = """#!/usr/bin/env python3
import json, os, sys
with open(os.environ["HOME"] + "/calls", "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
if sys.argv[1] == "version":
    print("27.0")
elif sys.argv[1] == "run":
    at = sys.argv.index("-I")
    os.chdir(os.environ["HOME"])
    os.execvp("python3", ["python3", *sys.argv[at:]])
"""


@pytest.fixture
def fake_docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An executable that notes what it is asked, and runs the server where no container is."""
    binary = tmp_path / "bin" / "docker"
    binary.parent.mkdir()
    binary.write_text(FAKE)
    binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{binary.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SECRET_KEY", "s3cret")
    docker._probe.cache_clear()
    yield tmp_path
    docker._probe.cache_clear()


def test_a_container_has_a_network_or_outlives_its_session(fake_docker: Path) -> None:
    sandbox = DockerSandbox(image="swe:1")
    assert "docker 27.0" in sandbox.probe().reason
    session = sandbox.open(SessionSpec(workdir=str(fake_docker), limits=Limits(processes=33)))
    assert session.run("echo [$SECRET_KEY]").output == "[]\n", "the trainer's variables"
    session.close()
    calls = [line for line in (fake_docker / "calls").read_text().splitlines() if '"run"' in line]
    (run,) = map(json.loads, calls)
    options = " ".join(run[: run.index("-I")])
    for wanted in (
        "--network none",
        "--cap-drop ALL",
        "--security-opt no-new-privileges",
        "--pids-limit 33",
        f"--memory {1 << 30}",
        "--read-only",
        "--user 65534:65534",
        "--interactive",
    ):
        assert wanted in options
    assert options.endswith("swe:1")
    assert "s3cret" not in options
    removed = f'["rm", "--force", "--volumes", "{run[run.index("--name") + 1]}"]'
    assert removed in (fake_docker / "calls").read_text().splitlines()


@pytest.mark.parametrize("said", ["welcome", "[]", "7", '{"level": "info"}', "\\xff"])
def test_what_an_image_says_first_is_an_answer(fake_docker: Path, said: str) -> None:
    (fake_docker / "bin" / "docker").write_text(f"#!/bin/sh\nprintf '%b\\n' '{said}'; exec cat\n")
    session = DockerSandbox().open(SessionSpec())
    result = session.run("true")
    assert (result.code, session.alive()) == (137, False)
    assert "the sandbox" in str(result.infra_error)


def test_a_docker_that_vanishes_raises_on_close(fake_docker: Path) -> None:
    session = DockerSandbox().open(SessionSpec(workdir=str(fake_docker)))
    assert session.run("true").code == 0
    (fake_docker / "bin" / "docker").unlink()
    session.close()


def test_the_image_of_an_instance_is_ignored(fake_docker: Path) -> None:
    spec = SessionSpec(workdir=str(fake_docker), image="instance:7")
    arguments = DockerSandbox(writable_root=True).arguments(spec, "name")
    assert "instance:7" in arguments
    assert "--read-only" not in arguments, "its repository is in the image"


def test_a_daemon_that_is_not_there_is_used(fake_docker: Path) -> None:
    (fake_docker / "bin" / "docker").write_text("#!/bin/sh\necho no daemon here >&2; exit 1\n")
    found = DockerSandbox().probe()
    assert not found.usable
    assert "no daemon here" in found.reason
    session = DockerSandbox().open(SessionSpec())
    assert "no daemon here" in str(session.run("true").infra_error)


@pytest.mark.parametrize(
    ("script", "why"),
    [("echo no such thing; exit 1", "cannot be pulled: no such thing"), ("exec sleep 60", "0 s")],
)
def test_an_image_that_cannot_be_pulled_takes_for_ever(
    fake_docker: Path, script: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = f"#!/bin/sh\ncase $1 in image) exit 1;; esac\n{script}\n"
    (fake_docker / "bin" / "docker").write_text(fake)
    monkeypatch.setattr(docker, "PULL_S", 0.3)
    session = DockerSandbox("an/image:1").open(SessionSpec())
    result = session.run("true")
    assert (result.code, session.alive()) == (137, False)
    assert "the image an/image:1 cannot be pulled" in str(result.infra_error)
    assert why in str(result.infra_error)
