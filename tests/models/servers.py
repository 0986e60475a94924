"""The section on real servers: what `make test-vllm` found and kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).parents[2] / "docs" / "results" / "servers"


def page() -> str:
    """The section, in Markdown."""
    parts = [_machine(json.loads(path.read_text())) for path in sorted(FIGURES.glob("*.json"))]
    return "\n\n".join(["## Servers", *(parts or ["`make test-vllm` was not run."])]) + "\n"


def _machine(found: Mapping[str, Any]) -> str:
    """What was found on one machine."""
    trained, two, speed = found["trained"], found["two_servers"], found["speed"]
    best = speed["tokens/s, best round"]
    rows = [
        (
            f"training through vLLM {found['vllm']}, {trained['iterations']} iterations",
            f"{trained['responses']} responses; server's log-probabilities against the policy's "
            f"own: at most {trained['largest gap of log-probabilities, nats']:.1e} nats apart; "
            f"{_reused(trained)} of the prompts' tokens came from its prefix cache",
        ),
        (
            "the server is killed in a rollout",
            f"the run ends: *{trained['said at the kill']}*, and the command that starts one; "
            f"with `ckpt_path=last` it went on to iteration {found['went_on']['to iteration']}",
        ),
        (
            "two servers share the episodes, the engine of one is killed",
            f"{two['finished after one was killed']} of {two['episodes']} episodes finished; its "
            f"last words: *{two['last words']}*",
        ),
        (
            "a server without our options, asked at the start",
            "; ".join(found["started_without_our_options"]),
        ),
        (
            f"sampled tokens a second, the same tasks, seeds and limits, {speed['threads']} thread "
            f"each, the best of {speed['rounds']} rounds by turns",
            f"`engine=vllm` {best['vllm']}, `engine=hf` {best['hf']}: {speed['ratio']} times",
        ),
        ("`policy=api`, vLLM's chat endpoint", _chat(found["chat_of_vllm"])),
        ("`policy=api`, `transformers serve`", _chat(found["chat_of_transformers"])),
    ]
    head = (
        f"Written by `make test-vllm`: SmolLM2-135M-Instruct in float32 on a CPU, torch "
        f"{found['torch']}; the servers' transformers is {found['transformers_of_the_servers']}.\n"
    )
    table = ["| tried | found |", "|---|---|", *(f"| {name} | {what} |" for name, what in rows)]
    return "\n".join([head, *table])


def _reused(trained: Mapping[str, Any]) -> str:
    share = trained["prompt tokens found in the prefix cache"] / trained["prompt tokens"]
    return f"{100 * share:.0f} %"


def _chat(found: Mapping[str, Any]) -> str:
    said = f"; a context that is too long: *{found['overflow']}*" if "overflow" in found else ""
    odd = ", ".join(f"{name} {count}" for name, count in found["handled"].items()) or "none"
    return (
        f"{found['games']} games, {found['replies']} replies, out of the ordinary: {odd}; asked "
        f"for again: {found['requests of a second run']} requests{said}"
    )
