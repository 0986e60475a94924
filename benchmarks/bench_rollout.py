"""Rollout engine against ``model.generate`` that encodes the whole history again at every turn.

Both play one scripted workload: episodes in groups that share a prompt, ragged responses and
observations. Tokens are sampled exactly (temperature 1, no top-k, no top-p), and the engine's
log-probabilities are compared with one teacher-forced pass over every transcript.

    python benchmarks/bench_rollout.py
    python benchmarks/bench_rollout.py --episodes 64 --turns 6 --json
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from aem_lightning.rollout.engine import Request, Sampling
from aem_lightning.rollout.slot_engine import SlotEngine

VOCABULARY = 4096
CONFIG = Qwen2Config(  # 3.4M parameters
    vocab_size=VOCABULARY,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.05,
    tie_word_embeddings=True,
)


@dataclass
class Episode:
    """A script, what to add after each response of which length, and what came of it."""

    ids: list[int]
    observations: list[list[int]]
    lengths: list[int]
    sampled: list[int] = field(default_factory=list)  # positions of sampled tokens in ids
    logprobs: list[float] = field(default_factory=list)

    def respond(self, turn: int, tokens: list[int], logprobs: list[float]) -> None:
        self.sampled += range(len(self.ids), len(self.ids) + len(tokens))
        self.logprobs += logprobs
        self.ids = [*self.ids, *tokens, *self.observations[turn]]


def script(episodes: int, group_size: int, turns: int, seed: int = 0) -> list[Episode]:
    rng = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(low, high))]

    prompts = [tokens(300, 500) for _ in range(-(-episodes // group_size))]
    counts = [rng.randint(max(1, turns // 2), turns) for _ in range(episodes)]
    return [
        Episode(
            prompts[index // group_size],
            [tokens(30, 80) for _ in range(count)],
            [rng.randint(8, 40) for _ in range(count)],
        )
        for index, count in enumerate(counts)
    ]


def pad_left(rows: list[list[int]]) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[0] * (width - len(row)) + row for row in rows])


@torch.no_grad()
def play_generate(model: Qwen2ForCausalLM, episodes: list[Episode]) -> None:
    # generate() merges the model's own config even into one that is passed: it is overwritten.
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, pad_token_id=0
    )
    for turn in range(max(len(episode.lengths) for episode in episodes)):
        live = [episode for episode in episodes if turn < len(episode.lengths)]
        out = model.generate(
            input_ids=pad_left([episode.ids for episode in live]),
            attention_mask=pad_left([[1] * len(episode.ids) for episode in live]),
            max_new_tokens=max(episode.lengths[turn] for episode in live),
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = out.sequences[:, -len(out.logits) :]
        logprobs = torch.stack(out.logits, 1).float().log_softmax(-1).gather(-1, tokens[..., None])
        for row, episode in enumerate(live):
            own = slice(0, episode.lengths[turn])
            episode.respond(turn, tokens[row, own].tolist(), logprobs[row, own, 0].tolist())


def play_engine(model: Qwen2ForCausalLM, episodes: list[Episode]) -> None:
    engine = SlotEngine(slots=len(episodes), max_length=4096)
    engine.sync(SimpleNamespace(causal_lm=model), version=0)
    for turn in range(max(len(episode.lengths) for episode in episodes)):
        engine.submit(
            Request(str(i), e.ids, Sampling(1.0, e.lengths[turn]), seed=1000 * turn + i)
            for i, e in enumerate(episodes)
            if turn < len(e.lengths)
        )
        for result in engine.poll(wait_all=True):
            episode = episodes[int(result.key)]
            episode.respond(turn, result.tokens, result.logprobs)
            if turn + 1 == len(episode.lengths):
                engine.close(result.key)


@torch.no_grad()
def error_against_teacher_forcing(model: Qwen2ForCausalLM, episodes: list[Episode]) -> float:
    worst = 0.0
    for episode in episodes:
        ids = torch.tensor([episode.ids])
        logprobs = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        forced = logprobs.gather(1, ids[0, 1:, None])[:, 0][torch.tensor(episode.sampled) - 1]
        worst = max(worst, (forced - torch.tensor(episode.logprobs)).abs().max().item())
    return worst


def measure(model: Qwen2ForCausalLM, play: Callable, options: argparse.Namespace) -> dict:
    play(model, script(2, 2, 1))
    episodes = script(options.episodes, options.group_size, options.turns)
    wall, cpu = time.perf_counter(), time.process_time()
    play(model, episodes)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    tokens = sum(len(episode.sampled) for episode in episodes)
    return {
        "tokens": tokens,
        "tokens_per_second": round(tokens / wall, 1),
        "tokens_per_cpu_second": round(tokens / cpu, 1),
        "max_logprob_error": error_against_teacher_forcing(model, episodes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(CONFIG).eval()
    engine = measure(model, play_engine, options)
    generate = measure(model, play_generate, options)
    ratio = engine["tokens_per_second"] / generate["tokens_per_second"]
    report = {"engine": engine, "generate": generate, "ratio": ratio}
    if options.json:
        print(json.dumps(vars(options) | report))
    else:
        print("\n".join(f"{name:9}{figures}" for name, figures in report.items()))


if __name__ == "__main__":
    main()
