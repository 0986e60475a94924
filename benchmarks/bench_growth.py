"""How the costs of rollout and update grow as turns double, for one policy after another.

The whole transcript stays in context, so a token costs more the later it comes: attention reads all
that lies before it. How much more hangs on the policy, as attention's share of the operations falls
as a policy gets wider. So the seconds are fitted over tokens and over operations.

    python benchmarks/bench_growth.py --models tiny 30m 0.5b --json growth.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from bench_rollout import engine_cost
from bench_update import episode, lora_policy, update_cost
from common import growth_exponent, print_growth, print_table, write_json
from meter import Meter
from players import DEVICE, MODELS, Work, make_model, play_engine, script

COLUMNS = ("work", "turns", "tokens", "seconds", "operations", "extra_mib")
FITTED = (("seconds", "tokens"), ("seconds", "operations"), ("extra_mib", "tokens"))


def costs_of(shape: str, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """By the kind of work, an entry for each number of turns."""
    device = torch.device(DEVICE)
    model = make_model(shape)
    play_engine(model, script(Work(2, 1, 2)))
    meter = Meter(device)
    rollout = [
        {"turns": turns, **engine_cost(model, Work(8, turns), meter)} for turns in options.turns
    ]
    policy = lora_policy(model, device)
    update_cost(policy, [episode(4, 0, "transcript")], device)
    update = [
        {"turns": turns, **update_cost(policy, [episode(turns, 0, "transcript")], device)}
        for turns in options.update_turns
    ]
    return {f"rollout, {shape}": rollout, f"update, {shape}": update}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["tiny", "30m"])
    parser.add_argument("--turns", type=int, nargs="+", default=[6, 12, 24, 48], help="of rollouts")
    parser.add_argument("--update-turns", type=int, nargs="+", default=[5, 10, 20, 40, 80])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="where to write the results")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    costs: dict[str, list[dict[str, Any]]] = {}
    for shape in options.models:
        costs |= costs_of(shape, options)
    exponents = {
        f"{work}, {cost} over {size}": growth_exponent(
            [entry[size] for entry in entries], [entry[cost] for entry in entries]
        )
        for work, entries in costs.items()
        for cost, size in FITTED
        if all(entry[cost] for entry in entries)
    }
    rows = [
        (work, *(entry[column] for column in COLUMNS[1:]))
        for work, entries in costs.items()
        for entry in entries
    ]
    print_table("Whole transcripts as turns double", COLUMNS, rows)
    print_growth("Growth over turns, whole transcripts", exponents)
    write_json(
        options.json,
        {"settings": vars(options), "costs": costs, "growth": {"exponents": exponents}},
    )


if __name__ == "__main__":
    main()
