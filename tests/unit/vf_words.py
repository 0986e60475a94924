"""Packages of verifiers' kind, in one module: a word to find in three turns, and one question."""

from __future__ import annotations

from typing import Any

import verifiers as vf
from datasets import Dataset
from gym_words import WORDS

SYSTEM = {"role": "system", "content": "Find the word."}


def rows(first: int, after: int) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": [SYSTEM, {"role": "user", "content": f"Number {n}: not {WORDS[n % 3]}."}],
                "answer": WORDS[(n + 1) % 3],
            }
            for n in range(first, after)
        ]
    )


async def right(completion: Any, answer: str) -> float:
    said = [m for m in completion if dict(m)["role"] == "assistant"]
    return float(dict(said[-1])["content"] == answer)


async def short(completion: Any) -> float:
    return 1.0 / len(completion)


class Guess(vf.MultiTurnEnv):
    async def env_response(self, messages: Any, state: Any, **_: Any) -> Any:
        if dict(messages[-1])["content"] == state["answer"]:
            state["final_env_response"] = [{"role": "user", "content": "Found."}]
        return [{"role": "user", "content": "Not that."}]

    @vf.stop
    async def found(self, state: Any) -> bool:
        said = state["trajectory"][-1]["completion"] if state["trajectory"] else ()
        return bool(said) and dict(said[-1])["content"] == state["answer"]


def load_environment(kind: str = "several", held_out: bool = False) -> vf.Environment:
    rubric = vf.Rubric(funcs=[right, short], weights=[1.0, 0.5])
    more = {"eval_dataset": rows(100, 103)} if held_out else {}
    if kind == "one":
        return vf.SingleTurnEnv(dataset=rows(0, 9), rubric=rubric, **more)
    return Guess(dataset=rows(0, 9), rubric=rubric, max_turns=3, **more)
