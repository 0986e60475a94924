"""Rollouts side by side: our engine, ``generate``, continuous batching, TRL's environment rollout.

All play episodes of several turns in groups that share a prompt, with ragged responses and
observations, by exact sampling (temperature 1, no top-k, no top-p). ``generate`` and continuous
batching encode the whole history again at every turn; a batching manager lives for one version of
the weights, as a kept one would go on with old keys and values. The log-probabilities of our engine
and of ``generate`` are compared with one teacher-forced pass over every transcript.

TRL plays a game of the same shape whose responses end at one of many stop ids: what is compared is
tokens per second.

With ``--vllm`` a server of vLLM's build for CPUs plays too, on a chat model with LoRA; `vllm_peer`
says how. ``--players vllm`` plays that alone.

With ``--budget`` a player stops at the first turn that begins so many seconds after its start: the
table says which share of the work it played, and its rate is that of this share. Early turns are
the cheap ones, so of a peer that is stopped sooner the rate is flattered, never ours.

    python benchmarks/bench_rollout.py
    python benchmarks/bench_rollout.py --episodes 1 16 64 --turns 6 20 --model 30m --budget 60
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from common import print_table, write_json
from players import (
    DEVICE,
    LONGEST,
    MODELS,
    PLAYERS,
    Episode,
    Work,
    make_model,
    script,
    stop_ids,
)
from transformers import Qwen2ForCausalLM
from trl_peer import run_trl, trl_version
from vllm_peer import compare_vllm, why_left_out
from word_world import DONE, WORDS, WordGame

from aem_lightning.modules import build_tokenizer


@torch.no_grad()
def error_against_teacher_forcing(model: Qwen2ForCausalLM, episodes: list[Episode]) -> float:
    worst = 0.0
    for episode in episodes:
        ids = torch.tensor([episode.ids], device=DEVICE)
        logprobs = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        forced = logprobs.gather(1, ids[0, 1:, None])[:, 0].cpu()
        own = forced[torch.tensor(episode.sampled) - 1]
        worst = max(worst, (own - torch.tensor(episode.logprobs)).abs().max().item())
    return worst


def measure(
    model: Qwen2ForCausalLM, name: str, work: Work, check: bool, budget: float
) -> dict[str, Any]:
    play = PLAYERS[name]
    play(model, script(replace(work, episodes=2, group_size=2, turns=1)))
    episodes = script(work)
    wall, cpu = time.perf_counter(), time.process_time()
    play(model, episodes, wall + budget)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    tokens = sum(len(episode.sampled) for episode in episodes)
    result = {
        "tokens": tokens,
        "played": tokens / sum(sum(episode.lengths) for episode in episodes),
        "seconds": wall,
        "tokens_per_second": tokens / wall,
        "tokens_per_cpu_second": tokens / cpu,
    }
    if check and episodes[0].logprobs:
        result["max_logprob_error"] = error_against_teacher_forcing(model, episodes)
    return result


def measure_trl(model: Qwen2ForCausalLM, work: Work) -> dict[str, Any]:
    """TRL's environment rollout; whole groups only."""
    tokenizer = build_tokenizer([*WORDS, DONE])
    settings = {
        "tasks": max(1, work.episodes // work.group_size),
        "group_size": min(work.group_size, max(2, work.episodes)),
        "turns": work.turns,
        "max_new_tokens": LONGEST,
        "lr": 1e-5,
        "lora_r": 8,
        "kl": 0.0,
    }
    times = run_trl(
        model, tokenizer, partial(WordGame, turns=work.turns), settings, stop_ids(tokenizer)
    )
    return {
        "tokens": times.tokens,
        "seconds": times.rollout,
        "tokens_per_second": times.tokens / times.rollout,
    }


def compare(
    work: Work,
    players: Sequence[str],
    model: str = "tiny",
    check: bool = False,
    budget: float = math.inf,
) -> dict[str, Any]:
    """Each player's figures on ``work``, and how many times as fast as it our engine is.

    TRL can't be stopped: it is left out where ``generate`` could not play ``work`` in ``budget``.
    """
    network = make_model(model)
    results: dict[str, Any] = {}
    for name in players:
        if name != "trl":
            results[name] = measure(network, name, work, check, budget)
        elif results.get("generate", {}).get("played", 1.0) == 1.0:
            results[name] = measure_trl(network, work)
    best = results["engine"]["tokens_per_second"]
    ratios = {
        name: best / result["tokens_per_second"] if result["tokens"] else None
        for name, result in results.items()
    }
    return {"work": asdict(work), "model": model, "results": results, "ratios": ratios}


def show(report: dict[str, Any]) -> None:
    work = report["work"]
    rows = [
        (
            name,
            result["tokens"],
            100 * result.get("played", 1.0),
            result["tokens_per_second"],
            result.get("tokens_per_cpu_second", "-"),
            report["ratios"][name],
            result.get("max_logprob_error", "-"),
        )
        for name, result in report["results"].items()
    ]
    title = f"{report['model']}, {work['episodes']} episodes x {work['turns']} turns"
    columns = (
        "player",
        "tokens",
        "% played",
        "tokens/s",
        "tokens/CPU-s",
        "engine is x",
        "log-prob error",
    )
    print_table(title, columns, rows)


def show_ratios(reports: Sequence[dict[str, Any]]) -> None:
    """All works in one table: how many times as fast as each peer our engine is."""
    peers = list(dict.fromkeys(p for report in reports for p in report["results"]))[1:]
    rows = []
    for report in reports:
        work, results = report["work"], report["results"]
        stopped = {p: "+" for p in peers if results.get(p, {}).get("played", 1.0) < 1.0}
        ratios = [report["ratios"].get(p) for p in peers]
        errors = [r["max_logprob_error"] for r in results.values() if "max_logprob_error" in r]
        rows.append(
            (
                f"{report['model']}, {work['episodes']} x {work['turns']}",
                results["engine"]["tokens_per_second"],
                100 * results["engine"]["played"],
                *(
                    None if ratio is None else f"{ratio:.3g}{stopped.get(peer, '')}"
                    for peer, ratio in zip(peers, ratios, strict=True)
                ),
                max(errors, default=None),
            )
        )
    columns = ("episodes x turns", "tokens/s", "% played", *(f"x {p}" for p in peers), "error")
    stopped_early = "a peer stopped by the budget in its first turns, the cheap ones"
    print_table(f"Engine against its peers (+: {stopped_early})", columns, rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--turns", type=int, nargs="+", default=[10, 20])
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--model", "--size", choices=MODELS, default="tiny")
    parser.add_argument("--budget", type=float, help="most seconds of a player")
    parser.add_argument("--brief", action="store_true", help="one table for all works")
    parser.add_argument("--players", nargs="+", choices=[*PLAYERS, "trl", "vllm"])
    parser.add_argument("--vllm", help="a server's virtual environment, or http://host:port")
    parser.add_argument("--chat-model", default="../data/models/smollm2-135m-instruct")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="where to write the results")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    asked = options.players or [*PLAYERS, "trl", "vllm"]
    players = ["engine", *(p for p in asked if p not in ("engine", "vllm"))]
    if "trl" in players and trl_version() is None:
        print("trl is not installed and is left out: pip install trl")
        players.remove("trl")
    reports, budget = [], options.budget or math.inf
    if "vllm" in asked:
        if reason := why_left_out(options.vllm, options.chat_model):
            print(f"vllm is left out: {reason}")
        else:
            reports.append(compare_vllm(options.vllm, options.chat_model, budget))
            show(reports[-1])
    for episodes in options.episodes if asked != ["vllm"] else ():
        for turns in options.turns:
            work = Work(episodes, turns, options.group_size)
            reports.append(compare(work, players, options.model, check=True, budget=budget))
            if not options.brief:
                show(reports[-1])
    ours = [report for report in reports if "vllm" not in report["results"]]
    if ours and (options.brief or len(ours) > 1):
        show_ratios(ours)
    write_json(options.json, {"settings": vars(options), "reports": reports})


if __name__ == "__main__":
    main()
