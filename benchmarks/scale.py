"""What an iteration costs on 1 to 64 GPUs: a simulation from the seconds of its stages on one.

    python benchmarks/scale.py --run logs/alfworld_grpo_aem/<time>          # its step_time.json
    python benchmarks/scale.py --rollout 210 --score 150 --update 285       # or as typed
    python benchmarks/scale.py --run ... --split --engine-speed 2           # beside servers of vLLM

Assumed, and to be typed otherwise where it is known:

- A GPU's rollout is part ``--fixed``, the steps of its longest episode, which as many GPUs as you
  like do not shorten (each reads all weights), and for the rest its share of the tokens.
- Scores and update go by a GPU's share of the tokens.
- Tokens of an episode are log-normal: ``--spread`` of a task's copies around their task, and as
  much again of tasks. A group stays on one GPU; whoever has short episodes waits for the others.
- At each of ``--steps`` optimizer steps ``--adapter-mb`` go around a ring at ``--link-gbs``; with
  ``--frozen-gb`` (trainer=fsdp) each of ``--passes`` micro-batches collects so much, half of it
  behind the computation.
- Up to ``--tasks`` GPUs the batch is the same; with more GPUs than tasks there is a task for each.
- Servers (``--split``) take episodes from any GPU, so none waits for a group; trainers wait
  meanwhile, and servers during the update.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import print_table

SIZES = (1, 2, 4, 8, 16, 32, 64)
SCORES = ("old_logprobs", "ref_logprobs", "advantage", "modulation")
DRAWS = 400


def lengths(options: argparse.Namespace, tasks: int) -> np.ndarray:
    """Tokens of episodes, relative to their mean: [draws, tasks, copies]."""
    random = np.random.default_rng(0)
    sigma = np.sqrt(np.log1p(options.spread**2))
    of_task = random.lognormal(0.0, sigma, (DRAWS, tasks, 1))
    found: np.ndarray = of_task * random.lognormal(0.0, sigma, (DRAWS, tasks, options.copies))
    return found / found.mean(axis=(1, 2), keepdims=True)


def iteration(options: argparse.Namespace, gpus: int, servers: int = 0) -> tuple[float, float]:
    """Seconds of an iteration on ``gpus``, ``servers`` of them sampling alone; the share waited."""
    trainers = gpus - servers
    tasks = max(options.tasks, trainers)
    tokens = lengths(options, tasks)
    one = lengths(options, options.tasks)  # the batch whose seconds were measured
    chain, total = one.max(axis=(1, 2)).mean(), one.sum(axis=(1, 2)).mean()
    shared = tokens.reshape(DRAWS, trainers, -1) if tasks % trainers == 0 else None
    if shared is None:
        raise ValueError(f"{tasks} tasks cannot be shared by {trainers} GPUs")
    work = shared.sum(axis=2)  # [draws, trainers]
    if servers:
        longest = np.repeat(tokens.max(axis=(1, 2))[:, None], servers, axis=1)
        load = np.repeat(tokens.sum(axis=(1, 2))[:, None] / servers, servers, axis=1)
        speed = options.engine_speed
    else:
        longest, load, speed = shared.max(axis=2), work, 1.0
    fixed = options.fixed
    rollout = options.rollout * (fixed * longest / chain + (1 - fixed) * load / total) / speed
    training = (options.score + options.update) * work / total
    link = options.link_gbs * 1e9
    sums = options.steps * 2 * (trainers - 1) / trainers * options.adapter_mb * 1e6 / link
    spread = min(trainers, options.per_machine)  # layers are collected inside a machine
    passes = options.passes * work.max(axis=1) / total
    layers = passes * 0.5 * options.frozen_gb * 1e9 * (spread - 1) / spread / link
    seconds = rollout.max(axis=1) + training.max(axis=1) + sums + layers
    busy = (rollout.sum(axis=1) + training.sum(axis=1)) / gpus
    return float(seconds.mean()), float(1 - (busy / seconds).mean())


def table(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of GPUs; with ``split`` the best number of servers beside it."""
    rows = []
    alone, _ = iteration(options, 1)
    for gpus in SIZES:
        seconds, waited = iteration(options, gpus)
        tasks = max(options.tasks, gpus)
        done = tasks / options.tasks
        row = {
            "GPUs": gpus,
            "tasks": tasks,
            "s": round(seconds, 1),
            "speed-up": round(alone * done / seconds, 2),
            "GPU-s an episode": round(gpus * seconds / (tasks * options.copies), 1),
            "waited %": round(100 * waited),
        }
        if options.split and gpus > 1:
            counts = [n for n in range(1, gpus) if max(options.tasks, gpus - n) % (gpus - n) == 0]
            best = {n: iteration(options, gpus, n)[0] for n in counts}
            servers = min(best, key=best.__getitem__)
            row |= {"servers": servers, "s with them": round(best[servers], 1)}
        rows.append(row)
    return rows


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, seconds of a run filled in."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="the folder of a run on one GPU")
    for name in ("rollout", "score", "update"):
        parser.add_argument(f"--{name}", type=float, help="seconds of an iteration")
    numbers = {"fixed": 0.4, "spread": 0.5, "engine_speed": 1.0, "link_gbs": 20.0}
    numbers |= {"adapter_mb": 295.0, "frozen_gb": 0.0}
    counts = {"tasks": 16, "copies": 8, "steps": 4, "passes": 100, "per_machine": 8}
    for name, value in {**numbers, **counts}.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(value), default=value, help=f"{value}")
    parser.add_argument("--split", action="store_true", help="servers of vLLM beside the trainers")
    options = parser.parse_args(arguments)
    if options.run is not None:
        measured = json.loads((options.run / "step_time.json").read_text(encoding="utf-8"))
        stages = {row["stage"]: row["seconds"] for row in measured["stages"]}
        per = {name: stages.get(name, 0.0) / measured["iterations"] for name in stages}
        options.rollout, options.update = per["rollout"], per["update"]
        options.score = sum(per.get(name, 0.0) for name in SCORES)
    if None in (options.rollout, options.score, options.update):
        parser.error("--run FOLDER, or --rollout, --score and --update, in seconds")
    return options


if __name__ == "__main__":
    found = table(parsed())
    columns = [*dict.fromkeys(name for row in reversed(found) for name in row)]
    print_table("an iteration", columns, [[row.get(name) for name in columns] for row in found])
