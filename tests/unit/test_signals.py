"""Signals that end a run, and ranks that end with each other: without a run of their own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from aem_lightning.envs.process import WorkerProcess
from aem_lightning.runner import ranks
from aem_lightning.runner.cli import clear_errors
from aem_lightning.runner.signals import Stopped, StopSignals, stop_signals, stoppable
from aem_lightning.runner.stopping import KeepLastIteration, requeued_checkpoint

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_otherwise_than_with_128_and_its_number(
    number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    ours = signal.signal(number, signal.default_int_handler)  # nohup lets SIGHUP be ignored
    try:
        with pytest.raises(Stopped) as stopped, stoppable(), clear_errors():
            send(number)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, ours)
    assert stopped.value.code == 128 + number
    (line,) = caplog.messages
    assert line.startswith(f"{number.name}: stopped. There is nothing to save yet")
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_signal_stops_what_must_come_to_its_end() -> None:
    done = []

    def run() -> None:
        signals = stop_signals()
        assert signals is not None
        signals.held = True
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("the update")
        signals.release()
        done.append("another iteration")

    with pytest.raises(Stopped), stoppable():
        run()
    assert done == ["the update"]


def test_a_trainer_that_takes_long_to_tidy_up_ends_in_an_alarm_clock(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """At its end it gives back what it found at its start, before there was any alarm."""

    def run() -> None:
        found = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)}
        try:
            send(signal.SIGTERM)
        finally:
            for number, handler in found.items():
                signal.signal(number, handler)
            time.sleep(1.2)

    with pytest.raises(Stopped), stoppable():
        run()
    assert caplog.messages[0].startswith("SIGTERM: stopped.")


def test_an_alarm_of_somebody_else_is_swallowed() -> None:
    heard: list[int] = []
    former = signal.signal(signal.SIGALRM, lambda number, frame: heard.append(number))
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGALRM)
            time.sleep(0.01)
    finally:
        signal.signal(signal.SIGALRM, former)
    assert heard == [signal.SIGALRM]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_is_lost_in_a_callback_of_the_garbage_collector() -> None:
    class Thing:
        pass

    things = [Thing()]
    watched = weakref.ref(things[0], lambda _: os.kill(os.getpid(), signal.SIGTERM))

    def run() -> None:
        things.clear()
        time.sleep(60)

    with pytest.raises(Stopped), stoppable():
        run()
    assert watched() is None


def test_a_second_signal_waits() -> None:
    code = (
        "import os, signal, time\n"
        "from aem_lightning.runner.signals import stoppable\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's & ignores it
        "with stoppable():\n"
        "    try:\n"
        "        print('up', flush=True); time.sleep(60)\n"
        "    finally:\n"
        "        print('tidying', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process, process.stdout as said:
        assert said.readline() == "up\n"
        process.send_signal(signal.SIGINT)
        assert said.readline() == "tidying\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
    assert process.returncode == 128 + signal.SIGINT


def test_a_terminal_signals_environment_workers() -> None:
    worker = WorkerProcess(b"", os.environ)
    try:
        assert os.getpgid(worker.pid) != os.getpgid(0)
    finally:
        worker.kill()


# ------------------------------------------------------------------------------------------- ranks


SLURM = {
    "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_JOB_NAME": "aem",
    "SLURM_JOB_ID": "7",
}


@pytest.mark.parametrize(
    ("rank", "given"), [("RANK", {"WORLD_SIZE": "2"}), ("SLURM_PROCID", SLURM)]
)
def test_ranks_of_a_launcher_name_their_folder_each_or_make_things_twice(
    rank: str, given: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ranks are this process, one after the other; rank 0 keeps the store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(ranks, "_store", None)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in {**given, **place, rank: "0", ranks.STAMP: "none yet"}.items():
        monkeypatch.setenv(name, value)
    ranks.meet()
    first, kept = os.environ[ranks.STAMP], ranks._store
    with ranks.first_rank_first("games"):
        pass
    monkeypatch.setattr(ranks, "_store", None)
    monkeypatch.setenv(rank, "1")
    ranks.meet()
    assert os.environ[ranks.STAMP] == first != "none yet"
    with ranks.first_rank_first("games"):
        pass
    monkeypatch.setattr(ranks, "FOREVER", timedelta(milliseconds=50))
    with pytest.raises(RuntimeError), ranks.first_rank_first("a model"):
        pytest.fail("rank 0 has not made it")
    assert ranks.several()
    del kept


def test_a_job_that_slurm_starts_again_starts_from_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been told to stop, have lost a machine, or be lost before it saved anything."""
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "0"}.items():
        monkeypatch.setenv(name, value)
    before = tmp_path / "before.ckpt"
    before.touch()
    runs = [
        OmegaConf.create(
            {"name": "a/b", "paths": {"log_dir": str(tmp_path), "output_dir": str(tmp_path / name)}}
        )
        for name in ("first", "second")
    ]
    trainer: Any = SimpleNamespace(
        is_global_zero=True,
        ckpt_path=None,
        _accelerator_connector=SimpleNamespace(cluster_environment=None),
    )
    signals = StopSignals()
    for cfg, ckpt_path in zip(runs, (None, before), strict=True):
        trainer.ckpt_path = ckpt_path
        KeepLastIteration(cfg, signals).on_train_start(trainer, SimpleNamespace())
    signals.restore()
    assert requeued_checkpoint(runs[1]) is None  # another command of the same job
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert requeued_checkpoint(runs[1]) == before
    own = tmp_path / "second" / "checkpoints" / "last.ckpt"
    own.parent.mkdir(parents=True)
    own.touch()
    assert requeued_checkpoint(runs[1]) == own
    assert requeued_checkpoint(OmegaConf.merge(runs[1], {"name": "other"})) is None


@pytest.fixture
def another_rank(monkeypatch: pytest.MonkeyPatch) -> subprocess.Popen[bytes]:
    monkeypatch.setattr(ranks, "NOTICE_S", 0.0)
    with subprocess.Popen(SLEEP) as process:
        monkeypatch.setattr(ranks, "_others", [process])
        yield process
        process.kill()


ECHO = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:2963")


def test_a_killed_rank_is_not_named(another_rank: subprocess.Popen[bytes], tmp_path: Path) -> None:
    assert ranks.lost(tmp_path) is None
    another_rank.kill()
    another_rank.wait()
    told = ranks.last_word(ECHO, str(ECHO), tmp_path)
    assert told.startswith("Rank 1 was killed by SIGKILL")
    assert "ckpt_path" not in told  # there is none


def test_a_rank_of_a_launcher_hides_what_another_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "NOTICE_S", 0.0)
    monkeypatch.setattr(ranks, "_store", object())
    assert ranks.last_word(ECHO, str(ECHO), tmp_path).startswith("Rank 0 raised [gloo")
    (tmp_path / "error_rank_12.log").write_text("KeyError: 'x'\nTraceback", encoding="utf-8")
    told = ranks.last_word(ECHO, str(ECHO), tmp_path)
    assert told.startswith(f"Rank 12 raised KeyError: 'x' ({tmp_path}/error_rank_12.log)")


def test_what_a_rank_raised_is_not_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    command = (
        "import pathlib; from aem_lightning.runner import ranks\n"
        "try: raise TypeError('wrong\\nthing')\n"
        "except TypeError as error:\n"
        f"    ranks.last_word(error, 'TypeError: wrong\\nthing', pathlib.Path({str(tmp_path)!r}))"
    )
    child = os.environ | {"LOCAL_RANK": "1"}
    with subprocess.Popen([sys.executable, "-c", command], env=child) as process:
        pass
    ranks._others[:] = [process]
    try:
        told = ranks.last_word(ECHO, str(ECHO), tmp_path)
    finally:
        ranks._others.clear()
    assert told.startswith(f"Rank 1 raised TypeError: wrong thing ({tmp_path}/error_rank_1.log)")
    assert told.endswith(f"ckpt_path={tmp_path}/checkpoints/last.ckpt goes on.")


def test_rank_0_leaves_others_behind(another_rank: subprocess.Popen[bytes], tmp_path: Path) -> None:
    try:
        raise ValueError("its own")
    except ValueError as error:
        told = ranks.last_word(error, "its own", tmp_path)
    assert told.startswith("Rank 0 raised its own")
    assert another_rank.wait(30) == -signal.SIGKILL
