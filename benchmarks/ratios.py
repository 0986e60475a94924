"""The regression guard: short benchmarks, whose ratios are compared with the committed ones.

Only ratios are compared, of two programs that were measured one after the other in one process:
they hold on another machine, seconds do not. Whatever else the machine does can only make a ratio
less certain, so the least of a few measurements is committed, and one good measurement passes.

    python benchmarks/ratios.py             # fails on a loss of more than 25 %
    python benchmarks/ratios.py --update    # writes benchmarks/ratios.json
    python benchmarks/ratios.py --vllm data/vllm-venv    # and rollouts beside a server of vLLM
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from common import print_table, write_json
from vllm_peer import why_left_out

COMMITTED = Path(__file__).with_name("ratios.json")
ALLOWED_LOSS = 0.25
REPEATS = 3
VLLM, BUDGET_S = "rollout_over_vllm", 300.0  # its name, and most seconds of each of the two


def losses(
    measured: Mapping[str, float], committed: Mapping[str, float], allowed: float = ALLOWED_LOSS
) -> list[str]:
    """What has become too slow, one sentence each: ratios further below the committed than allowed.

    A ratio that is missing on one side is a sentence too: the guard would else guard nothing.
    """
    said = []
    for name in sorted(measured.keys() | committed.keys()):
        if name not in measured:
            said.append(f"{name}: committed, but not measured")
        elif name not in committed:
            said.append(f"{name}: measured, but not committed; run with --update")
        elif measured[name] < committed[name] * (1 - allowed):
            loss = 1 - measured[name] / committed[name]
            said.append(
                f"{name}: {measured[name]:.2f}, committed {committed[name]:.2f}: "
                f"a loss of {loss:.0%}, allowed {allowed:.0%}"
            )
    return said


def measure_vllm(place: str, model: str) -> dict[str, float]:
    """The ratio that needs a server; see `vllm_peer`."""
    from vllm_peer import compare_vllm

    return {VLLM: compare_vllm(place, model, BUDGET_S)["ratios"]["vllm"]}


def measure() -> dict[str, float]:
    """The ratios of the guard, each of a benchmark that is short enough to be run often."""
    import bench_environment  # heavy, and not needed to compare what was measured
    import bench_rollout
    import bench_update
    import torch

    torch.set_num_threads(1)  # as in the benchmarks: models this small only wait for a second one
    rollout = bench_rollout.compare(
        bench_rollout.Work(episodes=8, turns=6), ("engine", "generate"), model="tiny"
    )
    environment = bench_environment.compare_short()
    update = bench_update.compare_short()
    return {
        "packed_over_history": update["transcript_over_history_10_time"],
        "packed_over_padded": update["packed_over_padded_time"],
        "rollout_over_generate": rollout["ratios"]["generate"],
        "environment_over_plain": environment["steps_per_s_ratio"],
    }


def least(measurements: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each ratio at its worst."""
    return {name: min(found[name] for found in measurements) for name in measurements[0]}


def best_of(
    measure: Callable[[], dict[str, float]], committed: Mapping[str, float]
) -> dict[str, float]:
    """Each ratio at its best, of as many measurements as it takes to pass, or of ``REPEATS``."""
    best: dict[str, float] = {}
    for _ in range(REPEATS):
        best = {name: max(ratio, best.get(name, 0.0)) for name, ratio in measure().items()}
        if not losses(best, committed):
            break
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write the measured ratios")
    parser.add_argument("--vllm", help="a server's virtual environment, or http://host:port")
    parser.add_argument("--chat-model", default="../data/models/smollm2-135m-instruct")
    options = parser.parse_args()
    known = (
        json.loads(COMMITTED.read_text(encoding="utf-8"))["ratios"] if COMMITTED.exists() else {}
    )
    own = {name: ratio for name, ratio in known.items() if name != VLLM}
    served: dict[str, float] = {}
    if reason := why_left_out(options.vllm, options.chat_model):
        print(f"{VLLM} is left out: {reason}")
    else:
        served = measure_vllm(options.vllm, options.chat_model)
    if options.update:
        measured = known | least([measure() for _ in range(REPEATS)]) | served
        write_json(COMMITTED, {"ratios": measured})
        print_table("Ratios written", ("name", "ratio"), sorted(measured.items()))
        return
    if not COMMITTED.exists():
        sys.exit(f"{COMMITTED} is missing: python benchmarks/ratios.py --update writes it")
    measured = best_of(measure, own) | served
    committed = known if served else own
    rows = [(name, ratio, committed.get(name, "-")) for name, ratio in sorted(measured.items())]
    print_table("Ratios", ("name", "measured", "committed"), rows)
    if said := losses(measured, committed):
        sys.exit("Slower than committed:\n  " + "\n  ".join(said))


if __name__ == "__main__":
    main()
