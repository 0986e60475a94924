"""What an environment leaves behind: open files, threads and memory, counted over many resets."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from aem_lightning.envs.base import TextEnv
from aem_lightning.types import Task

OPEN_FILES = "/dev/fd"
# Growth below which nothing is said, whatever the number of resets, and the windows of resets over
# which growth is watched. Files and threads of others come and go; the interpreter's own count of
# blocks moves by dozens either way, and by a hundred at the start.
NOISE = {"open files": 4, "threads": 4, "blocks of memory": 50}
WINDOWS = {"open files": 3, "threads": 3, "blocks of memory": 9}


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
    """What keeps growing over windows of half of ``resets`` resets, each with one step after it.

    The first window is for caches to fill. What grows in most of the `WINDOWS` after it, each time
    by one in two resets or more and by `NOISE` at least, is a leak; what did not in a third of them
    is none: no window decides alone where the interpreter's own blocks move too. Memory is counted
    in these blocks, so what a C library keeps does not show, nor what is kept over fewer than 100
    resets. ``count`` says what the environment's process holds.
    """
    half = resets // 2
    numbers = range(half)
    before = earlier = _play(env, tasks, seed, numbers, count)
    watched, still = set(NOISE), Counter[str]()
    leaks: dict[str, str] = {}
    for window in range(1, max(WINDOWS.values()) + 1):
        later = _play(env, tasks, seed, numbers, count)
        still.update(watched - _grown(earlier, later, half))
        watched = {name for name in watched if 3 * still[name] < WINDOWS[name]}
        leaks |= {
            name: f"reset() left {later[name] - before[name]:g} more {name} behind in "
            f"{half * window} episodes ({before[name]:g}, then {later[name]:g}); expected: no "
            "growth, since one environment plays thousands"
            for name in watched
            if WINDOWS[name] == window
        }
        watched = {name for name in watched if WINDOWS[name] > window}
        if not watched:
            break
        earlier = later
    return [leaks[name] for name in sorted(leaks)]


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
