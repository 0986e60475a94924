"""What a policy might try inside bubblewrap; limits are small, so that a failure is harmless."""

from __future__ import annotations

import errno
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from aem_lightning.envs.swe.sandbox import (
    BubblewrapSandbox,
    Limits,
    Session,
    SessionSpec,
    bubblewrap,
    cgroup,
)
from aem_lightning.envs.swe.sandbox.seccomp import seccomp_program

ISOLATION = BubblewrapSandbox().probe()
pytestmark = pytest.mark.skipif(not ISOLATION.usable, reason=ISOLATION.reason)
LIMITS = Limits(
    wall_s=20,
    cpu_s=10,
    memory_bytes=300 << 20,
    processes=48,
    file_bytes=4 << 20,
    disk_bytes=8 << 20,
    files=2_000,
    sockets=40,
    output_bytes=4000,
)


@pytest.fixture
def session() -> Iterator[Session]:
    opened = BubblewrapSandbox().open(SessionSpec(limits=LIMITS))
    yield opened
    opened.close()


def python(session: Session, code: str) -> str:
    return session.run("python -", stdin=code.encode()).output


def test_a_listener_on_this_machine_is_reached(session: Session) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            listener.accept()[0].close()  # from outside it can be
        code = f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=3)"
        assert "ConnectionRefusedError" in python(session, code)


def test_a_server_inside_cannot_be_used_inside(session: Session) -> None:
    code = (
        "import socket; s = socket.create_server(('127.0.0.1', 0)); "
        "socket.create_connection(s.getsockname()); print('met')"
    )
    assert python(session, code) == "met\n"


@pytest.mark.parametrize("name", ["python", "python3"])
def test_another_interpreter_than_the_trainers_runs(session: Session, name: str) -> None:
    result = session.run(f"{name} -c 'import sys, pytest; print(sys.version, sys.base_prefix)'")
    assert result.output == f"{sys.version} /opt/python\n"


def test_files_of_the_machine_are_seen(session: Session, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    for place in (secret, Path(__file__), Path("/etc/shadow"), Path("/root"), Path("/home/x")):
        assert session.run(f"cat {place} || ls {place}").code != 0
    assert session.run("ls /home").output == "agent\n"


@pytest.mark.parametrize(
    "place", ["/", "/usr", "/opt/python", "/opt/site", "/etc", "/proc/sys", "/dev"]
)
def test_a_file_is_written_outside_the_writable_folders(session: Session, place: str) -> None:
    assert session.run(f"touch {place}/x").code != 0


def test_variables_of_the_trainer_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "s3cret")
    opened = BubblewrapSandbox().open(SessionSpec(limits=LIMITS))
    everything = "env; cat /proc/*/environ /proc/*/task/*/environ; cat /proc/1/cmdline"
    output = opened.run(everything).output
    opened.close()
    assert "s3cret" not in output
    assert "HOME=/home/agent" in output


def test_forks_have_no_end() -> None:
    # Pages that copies share count in each of them, so memory must not be what stops it.
    roomy = SessionSpec(limits=replace(LIMITS, memory_bytes=1 << 30))
    session = BubblewrapSandbox().open(roomy)
    code = """
import os, time
count = 0
for _ in range(400):
    try:
        if os.fork() == 0:
            time.sleep(30)
            os._exit(0)
        count += 1
    except OSError:
        break
print(count)
"""
    try:
        assert 10 < int(python(session, code)) < LIMITS.processes
        assert session.run("ls -d /proc/[0-9]* | wc -l").output.strip() in {"3", "4", "5"}
    finally:
        session.close()


def test_a_fork_bomb_ends_the_session(session: Session) -> None:
    result = session.run(":(){ :|:& };:", wall_s=2)
    assert result.infra_error is None
    assert session.run("echo next").output == "next\n"


def test_two_sessions_share_one_limit_of_processes(session: Session) -> None:
    other = BubblewrapSandbox().open(SessionSpec(limits=LIMITS))
    many = "for i in $(seq 30); do sleep 1 & done; wait; echo done"
    try:
        assert session.run(many).output == "done\n"
        assert other.run(many).output == "done\n"
    finally:
        other.close()


def test_a_process_takes_more_than_its_memory(session: Session) -> None:
    assert "MemoryError" in python(session, "x = bytearray(400 << 20)")


def test_processes_together_take_more_memory_than_one_may(session: Session) -> None:
    one = "python -c 'import time; x = bytearray(b\"x\") * (150 << 20); time.sleep(9)'"
    result = session.run(f"{one} & {one} & {one} & wait; echo survived")
    assert "survived" not in result.output
    assert "memory" in result.output
    assert session.run("echo next").output == "next\n"


@pytest.mark.parametrize("place", ["/testbed", "/tmp", "/home/agent", "/dev/shm"])
def test_a_folder_grows_without_end(session: Session, place: str) -> None:
    fill = f"for i in $(seq 9); do head -c 3000000 /dev/zero > {place}/$i || exit 9; done"
    result = session.run(fill)
    assert result.code == 9
    assert "No space left" in result.output


@pytest.mark.parametrize("place", ["/testbed", "/tmp", "/home/agent", "/dev/shm"])
def test_empty_files_have_no_end(session: Session, place: str) -> None:
    code = f"""
import os
os.chdir({place!r})
open("a", "w")
for number in range(10_000):
    name = str(number)
    try:
        [lambda: open(name, "w"), lambda: os.mkdir(name), lambda: os.link("a", name)][number % 3]()
    except OSError as error:
        print(error.strerror, number)
        break
"""
    said, _, number = python(session, code).strip().rpartition(" ")
    assert said == "No space left on device"
    assert 900 < int(number) < LIMITS.files


# Each end takes what it can: kinds of sockets whose buffers do not grow, then one whose do.
SENDERS = """
import os, socket, time
def pair():
    if {kind!r} == "tcp":
        listener = socket.create_server(("127.0.0.1", 0))
        return [socket.create_connection(listener.getsockname()), listener.accept()[0]]
    return socket.socketpair(socket.AF_UNIX, getattr(socket, {kind!r}))
def fill():
    kept = []
    while True:
        for end in pair():
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)
            end.setblocking(False)
            kept.append(end)
            try:
                while True:
                    end.send(bytes({size}))
            except OSError:
                pass
for _ in range({processes}):
    if os.fork() == 0:
        fill()
time.sleep(10)
"""


@pytest.mark.skipif(seccomp_program() is None, reason="neither pyseccomp nor libseccomp")
@pytest.mark.parametrize(
    ("kind", "limits", "size", "processes"),
    [
        ("SOCK_STREAM", LIMITS, 65536, 4),
        ("SOCK_DGRAM", LIMITS, 4096, 1),
        ("tcp", replace(LIMITS, sockets=2_000, memory_bytes=60 << 20), 1 << 20, 1),
    ],
)
def test_what_is_sent_and_not_read_has_no_end(
    kind: str, limits: Limits, size: int, processes: int
) -> None:
    lost = []
    for _ in range(3):  # other processes take memory of the machine, too
        with closing(BubblewrapSandbox().open(SessionSpec(limits=limits))) as session:
            before = psutil.virtual_memory().available
            code = SENDERS.format(kind=kind, size=size, processes=processes)
            result = session.run("python -", stdin=code.encode(), wall_s=8)
            lost.append(before - psutil.virtual_memory().available)
            assert "[killed: together over " in result.output
            assert ("bytes of memory" if kind == "tcp" else "40 sockets") in result.output
            assert session.run("echo next").output == "next\n"
        if lost[-1] < 200 << 20:
            return
    pytest.fail(f"the machine lost {lost} bytes")


@pytest.mark.skipif(seccomp_program() is None, reason="neither pyseccomp nor libseccomp")
@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("mmap.mmap(-1, 4096)", "Function not implemented"),  # unmapped by halves, it stays
        ("mmap.mmap(os.open('/dev/zero', os.O_RDWR), 4096)", "No such device"),
        ("os.setxattr('/tmp', 'user.a', b'1')", "Operation not supported"),
        ("os.setxattr('/tmp', 'system.posix_acl_access', b'1')", "Operation not supported"),
    ],
)
def test_memory_that_no_limit_counts_can_be_had(session: Session, code: str, said: str) -> None:
    assert said in python(session, f"import mmap, os; {code}")
    assert session.run("head -c 2 /dev/zero | wc -c").output == "2\n"


ANOTHER = """
import os, sys
sys.path[:0] = {path!r}
from aem_lightning.envs.swe.sandbox import BubblewrapSandbox, Limits, SessionSpec
print(BubblewrapSandbox().probe().usable)
session = BubblewrapSandbox().open(SessionSpec(limits=Limits(files=500)))
print(session.run("for i in $(seq 600); do echo > $i || exit 9; done").code)
print(session.run("unshare --user true").code)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="the other tests are run by another user than root")
def test_another_user_than_root_has_other_bounds() -> None:
    python = f"/srv/bin/{Path(bubblewrap.INTERPRETER).name}"  # which that user can read
    script = (
        f"mount --bind {sys.base_prefix} /srv && "
        'exec setpriv --reuid 65534 --regid 65534 --clear-groups "$@"'
    )
    asked = ["unshare", "--mount", "sh", "-c", script, "sh", python, "-c"]
    code = ANOTHER.format(path=[place for place in sys.path if place])
    said = subprocess.run([*asked, code], capture_output=True, text=True, check=False, timeout=60)
    if said.returncode or said.stdout.startswith("False"):
        pytest.skip(f"that user has no project or no namespaces here: {said.stderr[-200:]}")
    assert said.stdout.split() == ["True", "9", "1"]


@pytest.mark.parametrize("passed_on", ["", "cpu memory pids"])
def test_a_control_group_is_left_out_or_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed_on: str
) -> None:
    slice_, process = tmp_path / "fs" / "user.slice", tmp_path / "self"
    (slice_ / "run.scope").mkdir(parents=True)
    process.mkdir()
    for folder, control in ((slice_, passed_on), (slice_ / "run.scope", "")):
        (folder / "cgroup.subtree_control").write_text(control)
        (folder / "cgroup.procs").write_text("")
    (process / "cgroup").write_text("0::/user.slice/run.scope\n")
    (process / "mountinfo").write_text(f"30 23 0:26 / {tmp_path}/fs rw - cgroup2 cgroup2 rw\n")
    place = cgroup.find_place(process)
    assert place == (slice_ if passed_on else None)
    monkeypatch.setattr(cgroup, "_place", lambda: place)
    session = BubblewrapSandbox().open(SessionSpec(limits=LIMITS))
    assert session.run("echo up").output == "up\n"
    groups = [*slice_.glob("aem-swe-*")]
    assert len(groups) == bool(passed_on)
    for group in groups:  # plain files, as no kernel stands behind them here
        assert (group / "memory.max").read_text() == str((300 + 4 * 8 + 64) << 20)
        assert (group / "cgroup.procs").read_text() == "0\n"
        [place.unlink() for place in group.iterdir()]
    session.close()


def test_a_bwrap_in_a_folder_of_its_own_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)  # for root, another user starts it
        own = Path(folder, "bwrap")
        own.write_text(f"#!/bin/sh\necho from here >&2\nexec {shutil.which('bwrap')} --no\n")
        own.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        result = BubblewrapSandbox().open(SessionSpec()).run("true")
    assert "from here" in str(result.infra_error)


def test_a_file_grows_without_end(session: Session) -> None:
    assert session.run("head -c 6000000 /dev/zero > /testbed/big").code != 0
    assert int(session.run("stat -c %s /testbed/big").output) <= LIMITS.file_bytes


@pytest.mark.skipif(seccomp_program() is None, reason="neither pyseccomp nor libseccomp")
def test_memory_that_is_not_mapped_has_no_end(session: Session) -> None:
    files = "import os; os.write(os.memfd_create('x'), b'x')"
    segments = "import ctypes; print(ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600))"
    assert "Function not implemented" in python(session, files)
    assert python(session, segments) == "-1\n"


@pytest.mark.skipif(seccomp_program() is None, reason="neither pyseccomp nor libseccomp")
@pytest.mark.parametrize("call", [("userfaultfd", 323, 282), ("io_uring_setup", 425, 425)])
def test_a_door_of_the_kernel_is_open(session: Session, call: tuple[str, int, int]) -> None:
    name, intel, arm = call
    number = {"x86_64": intel, "aarch64": arm}.get(platform.machine())
    if number is None:
        pytest.skip(f"the number of {name} is not known here")
    code = (
        "import ctypes; libc = ctypes.CDLL(None, use_errno=True); "
        f"libc.syscall({number}, 0, 0); print(ctypes.get_errno())"
    )
    assert int(python(session, code)) == errno.ENOSYS


def test_a_machine_without_the_filter_does_not_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bubblewrap, "seccomp_program", lambda: None)
    bubblewrap._probe.cache_clear()
    try:
        found = BubblewrapSandbox().probe()
    finally:
        bubblewrap._probe.cache_clear()
    assert found.usable
    assert "pip install 'aem-lightning[swe]'" in found.reason


TRAINER = """
from aem_lightning.envs.swe.sandbox import BubblewrapSandbox, SessionSpec
session = BubblewrapSandbox().open(SessionSpec())
print(session.run("echo up").output, flush=True)
session.run("sleep {seconds}")
"""


def test_a_sandbox_outlives_a_trainer_that_is_killed() -> None:
    seconds = str(40_000 + os.getpid() % 10_000)
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER.format(seconds=seconds)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == b"up\n"
    wait_for(lambda: bool(sleepers(seconds)))
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    wait_for(lambda: not sleepers(seconds))


def sleepers(seconds: str) -> list[int]:
    """The processes of this machine that sleep that long."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if process.info["cmdline"] == ["sleep", seconds]:
            found.append(process.pid)
    return found


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_session_ends_with_the_thread_that_opened_it() -> None:
    opened: list[Session] = []
    thread = threading.Thread(target=lambda: opened.append(BubblewrapSandbox().open(SessionSpec())))
    thread.start()
    thread.join()
    time.sleep(0.2)
    try:
        assert opened[0].run("echo next").output == "next\n"
    finally:
        opened[0].close()


def test_forks_outrun_the_sweep(session: Session) -> None:
    # Each parent is gone when its child is seen: killed one by one, the last is never found.
    result = session.run("for i in 1 2 3 4; do (f() { f & }; f) & done; sleep 0.5", wall_s=5)
    assert result.infra_error is None
    assert session.run("ls -d /proc/[0-9]* | wc -l").output.strip() in {"3", "4", "5"}


def test_killing_everything_ends_the_session(session: Session) -> None:
    session.run("kill -9 -1; sleep 1")
    session.run("kill -9 1; kill -TERM 1; kill -INT 1")
    assert session.run("echo next").output == "next\n"


def test_an_answer_is_forged(session: Session) -> None:
    forged = '{"code": 0, "output": "forged"}'
    code = f"""
import os
for pid in [1, os.getppid()]:
    for fd in range(12):
        try:
            with open(f"/proc/{{pid}}/fd/{{fd}}", "w") as pipe:
                pipe.write({forged!r} + chr(10))
                print("wrote to", pid, fd)
        except OSError:
            pass
try:
    open("/proc/1/mem", "r+b")
    print("opened the memory")
except OSError:
    pass
for fd in range(3, 64):
    try:
        os.write(fd, b"x")
        print("inherited", fd)
    except OSError:
        pass
print("end")
raise SystemExit(7)
"""
    result = session.run("python -", stdin=code.encode())
    own = [line for line in result.output.splitlines() if "wrote to 1 " in line]
    assert own == []
    assert "opened the memory" not in result.output
    assert "inherited" not in result.output
    assert result.code == 7


def test_rights_are_won_back(session: Session) -> None:
    assert session.run("unshare --user true").code != 0
    assert session.run("unshare --mount true").code != 0
    assert session.run("mount -t tmpfs none /tmp").code != 0
    assert session.run("find / -perm -4000 -type f -exec su -c id ';' 2>&1 | grep uid=0").code != 0
    status = session.run("cat /proc/self/status").output
    assert "NoNewPrivs:\t1" in status
    for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert f"{kind}:\t0000000000000000" in status
