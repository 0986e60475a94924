"""Sessions in real containers: ``make test-docker``, or wherever a daemon answers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import local_image
import pytest

from aem_lightning.envs.swe import FunctionsExpert, SweEnv, SweSettings, load_instances
from aem_lightning.envs.swe.sandbox import DockerSandbox, Limits, Session, SessionSpec, tar_of
from aem_lightning.envs.swe.sandbox import images as container_images
from aem_lightning.envs.swe.sandbox.engine import ask
from aem_lightning.envs.swe.tools import write_call

FOUND = DockerSandbox().probe()
pytestmark = pytest.mark.skipif(not FOUND.usable, reason=FOUND.reason)
LIMITS = Limits(
    wall_s=20,
    memory_bytes=300 << 20,
    processes=48,
    file_bytes=4 << 20,
    disk_bytes=8 << 20,
    files=500,
    sockets=40,
    output_bytes=4000,
)
SPEC = SessionSpec(limits=LIMITS)


def containers() -> list[str]:
    return ask("ps", "--all", "--quiet", "--filter", "name=aem-swe-").split()


def volumes() -> list[str]:
    return ask("volume", "ls", "--quiet").split()


@pytest.fixture(scope="module")
def image() -> Iterator[str]:
    before, volumes_before = set(containers()), set(volumes())
    yield os.environ.get("AEM_TEST_IMAGE") or local_image.build()
    end = time.monotonic() + 20
    while set(containers()) - before:
        assert time.monotonic() < end, "a container is left behind"
        time.sleep(0.1)
    # Podman's, each of them empty: it makes them first, and a start may be cut short just then.
    assert len(set(volumes()) - volumes_before) < 5, "volumes are left behind"


@pytest.fixture
def session(image: str) -> Iterator[Session]:
    opened = DockerSandbox(image).open(SPEC)
    yield opened
    opened.close()


def python(session: Session, code: str) -> str:
    return session.run("python3 -", stdin=code.encode()).output


def test_files_in_a_container_cannot_be_written(session: Session) -> None:
    every = bytes(range(256))
    assert session.put_tar(tar_of({"deep/a": every})).code == 0
    assert session.run("cat deep/a > b && cat b && rm b && ls /tmp").data == every
    assert session.run("cat -", stdin=every * 4000, output_bytes=1 << 21).data == every * 4000
    git = "git init -q . && git add -A && git commit -qm a && git log --format=%an"
    assert session.run(git).output == "agent\n"


def test_a_command_breaks_out_of_its_limits(session: Session) -> None:
    start = time.monotonic()
    result = session.run("setsid sleep 1234 & sleep 1234", wall_s=1)
    assert result.timed_out
    assert time.monotonic() - start < 10
    assert "1234" not in session.run("cat /proc/[0-9]*/cmdline").output
    assert "Read-only" in session.run("touch /usr/x").output
    full = session.run("for i in $(seq 600); do echo > $i || exit 9; done")
    assert (full.code, "No space left" in full.output) == (9, True)
    status = session.run("grep -E 'NoNewPrivs|CapEff|CapBnd' /proc/self/status").output
    assert status.split() == ["CapEff:", "0" * 16, "CapBnd:", "0" * 16, "NoNewPrivs:", "1"]
    unreachable = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=3)"
    assert "Network is unreachable" in python(session, unreachable)
    assert "MemoryError" in python(session, "x = bytearray(400 << 20)")
    sockets = "import socket, time\nx = [socket.socket() for _ in range(90)]\ntime.sleep(9)"
    assert "[killed: together over 40 sockets]" in python(session, sockets)
    forks = "import os\nfor _ in range(99):\n  if not os.fork(): os.execlp('sleep', 'sleep', '9')"
    assert "BlockingIOError" in python(session, forks)
    session.run("kill -9 -1; kill -9 1; sleep 1")
    assert session.run("echo next").output == "next\n"


def test_an_image_with_python3_only_is_not_graded(
    image: str, swe_root: Path, tmp_path: Path
) -> None:
    instance = load_instances("json", str(swe_root / "train.json"), cache_dir=str(tmp_path))[0]
    settings = SweSettings("docker", image=image, repositories=str(swe_root / "repositories"))
    finish = write_call("finish", command="submit")
    with closing(SweEnv([instance], settings)) as env:
        observation, info = env.reset(options={"task_id": instance.instance_id})
        expert, terminated = FunctionsExpert(instance), False
        while not terminated:
            action = expert.act(observation, info["admissible_actions"])
            observation, reward, terminated, truncated, info = env.step(action)
            assert not truncated, info["infra_error"]
        assert reward == 1.0, (info["reason"], *tmp_path.rglob("test_output.txt"))
        started = []
        for _ in range(3):
            time.sleep(1.5)  # what an update takes at least
            start = time.monotonic()
            env.reset(options={"task_id": instance.instance_id})
            started.append(time.monotonic() - start)
            assert env.step(finish)[1] == 0.0
        assert min(started) < 0.3, started


def test_a_container_started_ahead_is_another_kind_or_used_twice(image: str) -> None:
    sandbox = DockerSandbox(image)
    for limits in (LIMITS, replace(LIMITS, wall_s=3), replace(LIMITS, files=300)):
        session = sandbox.open(SessionSpec(limits=limits))
        assert [session.run("true").code for _ in range(2)] == [0, 0]
        assert session.run("ls; touch a; df -i . | tail -n 1").output.split()[1] == str(
            limits.files
        )
        assert sandbox._ahead is not None
        assert sandbox._ahead is not session
        session.close()


def test_an_images_own_files_are_written_for_others_too(image: str) -> None:
    sandbox = DockerSandbox(image, writable_root=True)
    spec = replace(SPEC, workdir="/opt/python")
    for _ in range(2):
        session = sandbox.open(spec)
        assert session.run("id -u; ls mine; echo x > mine && cat mine").output.split()[0] == "0"
        assert session.run("cat mine").output == "x\n"
        session.close()
    session = sandbox.open(spec)
    assert session.run("cat mine").code != 0
    session.close()


def test_processes_of_other_containers_count(image: str) -> None:
    spec = replace(SPEC, limits=replace(LIMITS, processes=16))
    sandboxes = [DockerSandbox(image) for _ in range(3)]
    sessions = [sandbox.open(spec) for sandbox in sandboxes]
    with ThreadPoolExecutor(3) as pool:
        forks = "for i in $(seq 10); do sleep 3 & done; echo started"
        said = [*pool.map(lambda session: session.run(forks + "; sleep 2").output, sessions)]
    for session in sessions:
        session.close()
    assert said == ["started\n"] * 3


def test_an_images_own_files_may_fill_the_disk(image: str) -> None:
    sandbox = DockerSandbox(image, writable_root=True)
    session = sandbox.open(replace(SPEC, workdir="/opt/python"))
    small = "head -c 3000000 /dev/zero > small"
    assert session.run(small + "; sleep 3").code == 0
    result = session.run(
        "for i in $(seq 9); do head -c 3000000 /dev/zero > $i; done; sleep 40", wall_s=60
    )
    assert result.seconds < 20
    over = f"bytes into its root folder, and may write {LIMITS.disk_bytes}"
    assert over in str(result.infra_error) or (sandbox._daemon_bounds and "space" in result.output)
    session.close()


def test_an_image_that_is_used_or_not_ours_is_removed(
    image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(container_images, "FRESH_S", 0.0)
    names = [f"aem-swe-test-layer:{name}" for name in ("used", "old", "hosts", "new")]
    for number, name in enumerate(names):
        (tmp_path / "file").write_bytes(bytes([number]) * 1000)
        subprocess.run(["tar", "-cf", tmp_path / "tar", "-C", tmp_path, "file"], check=True)
        ask("import", str(tmp_path / "tar"), name)
    container = ask("create", names[0], "true")
    try:
        for name in names[:2]:
            container_images._keep(name, None)
        sizes = [int(ask("image", "inspect", "--format", "{{.Size}}", name)) for name in names]
        container_images._keep(names[3], (sizes[0] + sizes[3]) / 10**9)
        listed = ask("image", "ls", "--format", "{{.Repository}}:{{.Tag}}").split()
        left = [name for name in names if any(line.endswith(name) for line in listed)]
        assert left == [names[0], *names[2:]]
    finally:
        ask("rm", container)
        ask("image", "rm", *left)


TRAINER = """
from aem_lightning.envs.swe.sandbox import DockerSandbox, SessionSpec
session = DockerSandbox({image!r}).open(SessionSpec())
print(session.run("echo up").output, flush=True)
session.run("trap '' TERM HUP; sleep 1000; sleep 1000", wall_s=2000)
"""


def test_a_busy_container_outlives_a_trainer_that_is_killed(image: str) -> None:
    before = set(containers())
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER.format(image=image)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == b"up\n"
    assert len(set(containers()) - before) == 1
    time.sleep(0.5)
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    end = time.monotonic() + 10
    while set(containers()) - before:
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.soak
def test_sixty_four_containers_at_once_are_too_many(image: str) -> None:
    sandbox = DockerSandbox(image)
    with ThreadPoolExecutor(64) as pool:
        sessions = [*pool.map(lambda _: sandbox.open(replace(SPEC, limits=Limits())), range(64))]
        fork = "echo $((6 * 7)); sleep 5 & sleep 5; wait"
        said = [*pool.map(lambda s: s.run(fork, wall_s=300), sessions)]
        assert len(containers()) >= 64
        [*pool.map(lambda s: s.close(), sessions)]
    assert [r.output for r in said] == ["42\n"] * 64
