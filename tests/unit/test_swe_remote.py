"""Sandboxes on other machines, which are processes of this one: what is lost with one of them."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
from hosts import SECRET, Machine, some_machines
from runs import COMMAND_ENVIRONMENT

from aem_lightning.envs import EnvPoolError
from aem_lightning.envs.swe import (
    FunctionsExpert,
    SweEnv,
    SweSettings,
    choose_sandbox,
    load_instances,
)
from aem_lightning.envs.swe.sandbox import Limits, LocalSandbox, RemoteSandbox, SessionSpec, tar_of
from aem_lightning.envs.swe.sandbox.remote import TOKEN, Connection, HostError, remote_sandbox
from aem_lightning.envs.swe.serve import main

SPEC = SessionSpec(limits=Limits(wall_s=10, output_bytes=2000))


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Machine]]:
    with some_machines(monkeypatch) as start:
        yield start


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_session_elsewhere_is_another_than_one_here(machines: Callable[..., Machine]) -> None:
    session = RemoteSandbox([machines().address]).open(SPEC)
    every = bytes(range(256))
    assert session.put_tar(tar_of({"deep/a": every})).code == 0
    here = LocalSandbox(allow_unsafe=True).open(SPEC)
    here.put_tar(tar_of({"deep/a": every}))
    for command in ("cat deep/a; exit 3", "yes | head -c 9000", "echo \0", "cd deep && cat -"):
        far, near = (s.run(command, stdin=every) for s in (session, here))
        assert asdict(far) | {"seconds": 0} == asdict(near) | {"seconds": 0}
    assert session.run("cat a", cwd="/testbed/deep").data == every
    assert session.run("sleep 9", wall_s=0.3).timed_out
    assert session.run("head -c 5000 /dev/zero", output_bytes=100).truncated
    assert session.alive()
    session.close()
    here.close()
    result = session.run("true")
    assert (result.code, result.infra_error) == (137, "the sandbox is closed")


def test_a_host_that_is_lost_takes_others_with_it(machines: Callable[..., Machine]) -> None:
    first, second, third = machines(), machines(), machines()
    sandbox = RemoteSandbox([m.address for m in (first, second, third)])
    sessions = [sandbox.open(SPEC) for _ in range(6)]
    assert [m.sessions() for m in (first, second, third)] == [2, 2, 2], "in turn"
    second.kill()
    results = [session.run("echo up") for session in sessions]
    lost = [r for r in results if r.infra_error]
    assert len(lost) == 2
    assert all(second.address in str(r.infra_error) for r in lost)
    assert [r.output for r in results if not r.infra_error] == ["up\n"] * 4
    again = [sandbox.open(SPEC) for _ in range(6)]
    assert [s.run("echo up").output for s in again] == ["up\n"] * 6, "it is left out"
    isolation = sandbox.probe()
    assert isolation.usable
    assert f"{second.address}: it was lost a moment ago" in isolation.reason
    first.kill()
    third.kill()
    assert "no host opens a session" in str(sandbox.open(SPEC).run("true").infra_error)
    for session in sessions + again:
        session.close()


@pytest.mark.parametrize("busy", [False, True])
def test_a_session_outlives_its_client(machines: Callable[..., Machine], busy: bool) -> None:
    machine = machines(sessions=1)
    sandbox = RemoteSandbox([machine.address])
    session = sandbox.open(SPEC)
    assert "all 1 sessions are taken" in str(sandbox.open(SPEC).run("true").infra_error)
    if busy:
        connection = session._connection
        assert connection is not None
        with contextlib.suppress(HostError):
            body = {"command": "sleep 60", "wall_s": 90, "cwd": None, "stdin": None}
            connection.ask("POST", "/run", body | {"output_bytes": None}, seconds=0.3)
    session.close()
    wait_for(lambda: machine.sessions() == 0)
    wait_for(lambda: sandbox.open(SPEC).run("echo next").output == "next\n")


def test_who_has_not_the_token_runs_a_command(machines: Callable[..., Machine]) -> None:
    machine = machines()
    for token in ("", "a token of the test", "\u00e9"):
        connection = Connection(machine.address, token)
        with pytest.raises(HostError, match="token"):
            connection.ask("POST", "/open", {"spec": asdict(SPEC)})
    assert machine.sessions() == 0
    strange = RemoteSandbox([machine.address], token="another")
    assert "the token is not that of this host" in strange.probe().reason


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{", b'{"spec": 1}', b'{"spec": {"limits": {"wall_s": "x"}, "y": 1}}', b"\xff"],
)
def test_a_request_that_is_none_ends_the_host(
    machines: Callable[..., Machine], body: bytes
) -> None:
    machine = machines()
    port = int(machine.address.rpartition(":")[2])
    for path, length in (("open", len(body)), ("run", len(body)), ("open", -1), ("open", 1 << 60)):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
            head = f"POST /{path} HTTP/1.1\r\nAuthorization: Bearer {SECRET}\r\n"
            raw.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode() + body)
            assert raw.recv(12) in (b"HTTP/1.1 400", b"HTTP/1.1 404")
    assert RemoteSandbox([machine.address]).open(SPEC).run("echo up").output == "up\n"


@pytest.mark.parametrize("said", [b"", b"hello\r\n", b"HTTP/1.1 200 OK\r\n\r\n[]"])
def test_what_is_no_host_is_used(monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    monkeypatch.setenv(TOKEN, SECRET)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sandbox = RemoteSandbox([f"http://127.0.0.1:{listener.getsockname()[1]}"])
        process = multiprocessing.get_context("fork").Process(target=say, args=(listener, said))
        process.start()
        found = sandbox.probe()
        process.kill()
        process.join()
    assert not found.usable
    assert "no host" in found.reason or "does not answer" in found.reason


def say(listener: socket.socket, said: bytes) -> None:
    while True:
        connection = listener.accept()[0]
        connection.recv(1000)
        connection.sendall(said)
        connection.close()


def test_settings_without_a_host_or_a_token_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    host = ("http://127.0.0.1:9",)
    remote_sandbox.cache_clear()
    with pytest.raises(ValueError, match=r"datamodule.pass_environment=\[AEM_SWE_TOKEN\]"):
        choose_sandbox(SweSettings("remote", hosts=host))
    monkeypatch.setenv(TOKEN, SECRET)
    with pytest.raises(ValueError, match="needs a list of hosts"):
        choose_sandbox(SweSettings("remote"))
    with pytest.raises(ValueError, match=r"'127\.0\.0\.1:9' is no address"):
        choose_sandbox(SweSettings("remote", hosts=["127.0.0.1:9"]))
    with pytest.raises(ValueError, match=r"type datamodule\.environment\.sandbox=remote"):
        SweSettings(hosts=host)
    with pytest.raises(
        EnvPoolError, match=r"no host can be used .*-m aem_lightning.envs.swe.serve"
    ):
        choose_sandbox(SweSettings("remote", hosts=host))
    monkeypatch.setenv(TOKEN, "short")
    with pytest.raises(SystemExit):
        main([])


def test_an_episode_elsewhere_is_graded_otherwise(
    machines: Callable[..., Machine], swe_root: Path, tmp_path: Path
) -> None:
    first, second = machines(), machines()
    instance = load_instances("json", str(swe_root / "train.json"), cache_dir=str(tmp_path))[0]
    hosts = [first.address, second.address]
    settings = SweSettings("remote", hosts=hosts, repositories=str(swe_root / "repositories"))
    with contextlib.closing(SweEnv([instance], settings)) as env:
        for killed in (None, first, None):
            observation, info = env.reset(options={"task_id": instance.instance_id})
            expert = FunctionsExpert(instance)
            if killed is not None:
                killed = first if first.sessions() else second
                killed.kill()
            ended = False
            while not ended:
                action = expert.act(observation, info["admissible_actions"])
                observation, reward, terminated, truncated, info = env.step(action)
                ended = terminated or truncated
            assert (reward, truncated) == ((0.0, True) if killed else (1.0, False))
            assert (killed is not None) == ("does not answer" in str(info.get("infra_error")))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_host_that_is_stopped_leaves_folders_or_processes(
    tmp_path: Path, number: signal.Signals
) -> None:
    command = ("-m", "aem_lightning.envs.swe.serve", "--port=0", "--sandbox=local")
    env = COMMAND_ENVIRONMENT | {TOKEN: SECRET, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, *command, "--allow-unsafe"], env=env, stderr=subprocess.PIPE, text=True
    ) as host:
        assert host.stderr is not None
        address = next(line.split()[-1] for line in host.stderr if "Sandboxes at" in line)
        session = RemoteSandbox([address], token=SECRET).open(SPEC)
        assert session.run("echo up").output == "up\n"
        (sandbox,) = psutil.Process(host.pid).children()
        assert [*tmp_path.iterdir()] != []
        with ThreadPoolExecutor(1) as one:  # and a command is at work
            running = one.submit(session.run, "touch begun; sleep 9")
            wait_for(lambda: [*tmp_path.rglob("begun")] != [])
            host.send_signal(number)
            assert host.wait(timeout=20) == 0
            assert running.result().infra_error
    assert [*tmp_path.iterdir()] == []
    assert not sandbox.is_running()
