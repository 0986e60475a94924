"""What an environment leaves behind: open files, threads and memory, counted over many resets."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence

from aem_lightning.envs.base import TextEnv
from aem_lightning.types import Task

OPEN_FILES = "/dev/fd"
AGAIN = 8  # times that growth has to go on; the interpreter's own has ended by then
# Growth below which nothing is said, whatever the number of resets. The interpreter's own count of
# blocks moves by a few with every thread that comes and goes.
NOISE = {"open files": 4, "threads": 4, "blocks of memory": 50}


def held() -> dict[str, int]:
    """What this process holds."""
    gc.collect()
    return {
        "open files": len(os.listdir(OPEN_FILES)),
        "threads": threading.active_count(),
        "blocks of memory": sys.getallocatedblocks(),
    }


def find_leaks(
    env: TextEnv,
    tasks: Sequence[Task],
    *,
    seed: int,
    resets: int,
    count: Callable[[], Mapping[str, float]] = held,
) -> list[str]:
    """What grows over the second half of ``resets`` resets, each with one step after it.

    The first half is for caches to fill. Whatever grows by one in two resets or more, and by
    ``NOISE`` at least, is a leak, if it does so again and again over as many more resets: other
    threads of the process come and go too, and the interpreter's own blocks with them. Memory is
    counted in these blocks, so what a C library keeps does not show, nor what is kept over fewer
    than 100 resets. ``count`` says what the environment's process holds.
    """
    half = resets // 2
    numbers = range(half)
    before, after = (_play(env, tasks, seed, numbers, count) for _ in range(2))
    leaks = _grown(before, after, half)
    earlier = after
    for _ in range(AGAIN):
        if leaks:  # so far
            later = _play(env, tasks, seed, numbers, count)
            leaks &= _grown(earlier, later, half)
            earlier = later
    return [
        f"reset() left {after[name] - before[name]:g} more {name} behind in {half} episodes "
        f"({before[name]:g}, then {after[name]:g}); expected: no growth, since one environment "
        "plays thousands"
        for name in sorted(leaks)
    ]


def _grown(before: Mapping[str, float], after: Mapping[str, float], resets: int) -> set[str]:
    return {
        name
        for name, least in NOISE.items()
        if after[name] - before[name] >= max(least, resets // 2)
    }


def _play(
    env: TextEnv,
    tasks: Sequence[Task],
    seed: int,
    numbers: range,
    count: Callable[[], Mapping[str, float]],
) -> Mapping[str, float]:
    """What is held after these episodes."""
    for number in numbers:
        task = tasks[number % len(tasks)]
        _, info = env.reset(seed=seed, options={"task_id": task.id})
        env.step(min(info.get("admissible_actions") or ("",)))
    return count()
