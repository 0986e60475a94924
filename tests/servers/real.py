"""Real servers as processes of the tests, and where their figures are kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from runs import ROOT

FIGURES = ROOT / "docs" / "results" / "servers" / "cpu.json"
START_S = 420.0
# What a small machine needs, and no server has to be started with.
THRIFT = "--enforce-eager --max-num-seqs 16 --host 127.0.0.1"
SERVER_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",  # as in the tests: two that share a busy core wait for each other
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass
class Server:
    """A server that was started by ``command``, from the environment ``venv``; its log is kept."""

    command: str
    port: int
    venv: Path
    log: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> float:
        """Start it, and wait until it answers; the seconds that it took."""
        ours = ("PYTHONPATH", "VIRTUAL_ENV")
        environment = {k: v for k, v in os.environ.items() if k not in ours} | SERVER_ENVIRONMENT
        environment["PATH"] = f"{self.venv / 'bin'}{os.pathsep}{environment['PATH']}"
        begun = time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                f"exec env {self.command}", shell=True, env=environment, stdout=log, stderr=log
            )
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > begun + START_S:
                self.kill()
                said = self.log.read_text(errors="replace")[-3000:]
                raise RuntimeError(f"{self.command} did not come up:\n{said}")
            time.sleep(1.0)
        return time.monotonic() - begun

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2.0) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def kill_engine(self) -> None:
        """End the processes behind it, as the kernel does where memory is short."""
        assert self.process is not None
        for child in psutil.Process(self.process.pid).children(recursive=True):
            child.send_signal(signal.SIGKILL)

    def kill(self) -> None:
        """End it and its children at once, as a machine that is taken away."""
        if self.process is None:
            return
        everyone = [psutil.Process(self.process.pid)] if self.process.poll() is None else []
        everyone += [child for one in everyone for child in one.children(recursive=True)]
        for one in everyone:
            try:
                one.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(everyone[1:], timeout=30)
        self.process.wait(30)
        self.process = None


def keep(**figures: Any) -> None:
    """Print ``figures``, and keep them beside those of other tests."""
    known = json.loads(FIGURES.read_text()) if FIGURES.is_file() else {}
    FIGURES.parent.mkdir(parents=True, exist_ok=True)
    FIGURES.write_text(json.dumps({**known, **figures}, indent=2, sort_keys=True) + "\n")
    print(json.dumps(figures, indent=2))
