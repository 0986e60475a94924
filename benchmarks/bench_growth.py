"""How the costs of rollout and update grow as turns and episodes double.

Turns with the whole transcript in context, for one policy after another: attention reads all that
lies before a token, so the later ones cost more, and the less so the wider a policy is. Their
seconds are therefore fitted over operations too. With the last two turns in context, as the paper
plays, and as episodes double, only for the first policy.

    python benchmarks/bench_growth.py --models tiny 30m 0.5b --json growth.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from bench_update import episode, lora_policy, time_update
from common import growth_exponent, operations, print_growth, print_table, write_json
from meter import Meter
from players import DEVICE, MODELS, Work, forked, make_model, play_engine, script
from transformers import Qwen2ForCausalLM

from aem_lightning.modules import Policy

# The work is tokens; memory is set aside for so many episodes of so many turns, however they go.
FITTED = (("seconds", "tokens"), ("seconds", "operations"), ("extra_mib", "doubled"))


@dataclass(frozen=True)
class Cost:
    """What a piece of work cost; the tokens are those of responses.

    A window's prompts are read again at every turn: its operations are not counted.
    """

    work: str
    doubled: int
    tokens: int
    operations: float | None
    seconds: float
    extra_mib: float | None


def rollout_cost(
    model: Qwen2ForCausalLM, kind: str, doubled: int, work: Work, window: int | None = None
) -> Cost:
    episodes = script(work)
    cost = Meter(torch.device(DEVICE))(
        partial(play_engine, model, episodes, window=window), repeats=1
    )
    done = None
    if window is None:
        done = sum(
            operations(model, len(episode.ids) - shared, shared)
            for episode, shared in zip(episodes, forked(work, episodes), strict=True)
        )
    tokens = sum(len(episode.sampled) for episode in episodes)
    return Cost(f"rollout, {kind}", doubled, tokens, done, **cost)


def update_cost(policy: Policy, kind: str, doubled: int, turns: int, episodes: int = 1) -> Cost:
    played = [episode(turns, seed, "transcript") for seed in range(episodes)]
    found = time_update(policy, played, torch.device(DEVICE))
    done = sum(operations(policy.causal_lm, len(one.rows[0]), backward=True) for one in played)
    costs = {name: found[name] for name in ("seconds", "extra_mib")}
    return Cost(f"update, {kind}", doubled, found["response_tokens"], done, **costs)


def costs_of(shape: str, options: argparse.Namespace, *, is_first: bool) -> list[Cost]:
    model = make_model(shape)
    play_engine(model, script(Work(2, 1, 2)))  # kernels and threads wake up
    rollout = partial(rollout_cost, model)
    found = [rollout(f"{shape}, turns", turns, Work(8, turns)) for turns in options.turns]
    if is_first:
        name = f"{shape}, turns, window of 2"
        found += [rollout(name, turns, Work(8, turns), 2) for turns in options.turns]
        found += [rollout(f"{shape}, episodes", size, Work(size, 6)) for size in options.episodes]
    policy = lora_policy(model, torch.device(DEVICE))
    update = partial(update_cost, policy)
    update("", 1, turns=1)
    found += [update(f"{shape}, turns", turns, turns) for turns in options.update_turns]
    if is_first:
        found += [update(f"{shape}, episodes", size, 10, size) for size in options.episodes]
    return found


def exponents_of(costs: Sequence[Cost]) -> dict[str, float]:
    """Of every work its seconds over tokens, over operations, and its memory over what doubles."""
    found = {}
    for work in dict.fromkeys(cost.work for cost in costs):
        part = [vars(cost) for cost in costs if cost.work == work]
        for figure, size in FITTED:
            is_asked = size != "operations" or work.endswith(" turns")
            if is_asked and len(part) > 1 and all(cost[figure] for cost in part):
                over = "" if size == "doubled" else f" over {size}"
                name = f"{work}: {figure}{over}"
                found[name] = growth_exponent(
                    [cost[size] for cost in part], [cost[figure] for cost in part]
                )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["tiny", "30m"])
    parser.add_argument("--turns", type=int, nargs="+", default=[6, 12, 24, 48], help="of rollouts")
    parser.add_argument("--update-turns", type=int, nargs="+", default=[5, 10, 20, 40, 80])
    parser.add_argument("--episodes", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="where to write the results")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    costs: list[Cost] = []
    for number, shape in enumerate(options.models):
        costs += costs_of(shape, options, is_first=number == 0)
    report(costs, vars(options), options.json)


def report(costs: Sequence[Cost], settings: dict[str, Any], target: str | None) -> None:
    exponents = exponents_of(costs)
    columns = ("work", "doubled", "tokens", "operations", "seconds", "extra_mib")
    print_table("Costs", columns, [[vars(cost)[name] for name in columns] for cost in costs])
    print_growth("Growth", exponents)
    entries = [vars(cost) for cost in costs]
    write_json(target, {"settings": settings, "costs": entries, "exponents": exponents})


if __name__ == "__main__":
    main()
