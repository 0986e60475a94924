"""A run's curves under the names that TRL logs, which rl-doctor and dashboards of TRL's read."""

from __future__ import annotations

import json
from pathlib import Path

from aem_lightning.files import write_atomically

Points = dict[str, dict[int, float]]
# TRL's names, and ours of the same quantity. Our `rollout/truncated_rate` is of episodes, and so
# not among them.
NAMES = {
    "reward": "train/return",
    "eval/score": "val/score",
    "entropy": "rollout/entropy",
    "kl": "policy/ref_kl",
    "clip_ratio/region_mean": "policy/clip_fraction",
    "grad_norm": "policy/grad_norm",
    "learning_rate": "policy/lr",
    "completions/mean_length": "rollout/response_tokens",
    "step_time": "time/total",
}
MIXED = "rollout/mixed_groups"


def read_curves(run: Path) -> Points:
    """The scalars of the TensorBoard files in the folder ``run``: by name, then by iteration.

    Raises:
        FileNotFoundError: There are none.
    """
    from aem_lightning.analysis.curves import read_points  # loads TensorBoard and scipy

    folders = {file.parent for file in run.rglob("events.out.tfevents.*")}
    if not folders:
        raise FileNotFoundError(f"{run}: there are no TensorBoard files in it (logger=tensorboard)")
    return read_points(sorted(folders))


def write_curves(points: Points, target: Path) -> str:
    """Write an iteration a line to ``target``; what to say of it.

    Raises:
        ValueError: No curve of a training run is among ``points``.
    """
    named = {theirs: points[ours] for theirs, ours in NAMES.items() if ours in points}
    if MIXED in points:
        uniform = {step: 1.0 - share for step, share in points[MIXED].items()}
        named["frac_reward_zero_std"] = uniform
    steps = sorted({step for curve in named.values() for step in curve})
    if not steps:
        raise ValueError(f"none of {len(points)} curves is one of a training run: {MIXED}, ...")
    lines = (
        json.dumps({"step": step, **{n: c[step] for n, c in named.items() if step in c}})
        for step in steps
    )
    write_atomically(target, "".join(f"{line}\n" for line in lines))
    return f"{len(named)} curves of {len(steps)} iterations: rl-doctor diagnose {target}"
