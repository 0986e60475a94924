"""A scripted game of many turns, and the programs that play it.

Responses and observations are ragged and of scripted lengths, whatever is sampled, so that all
programs do the same work. The copies of a group share their prompt.
"""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from aem_lightning.rollout.engine import Request, RolloutEngine, Sampling
from aem_lightning.rollout.slot_engine import SlotEngine

VOCABULARY = 4096
SHORTEST, LONGEST = 8, 40
LONGEST_TEXT = 80  # of what the environment says
PAGE = 256
MODELS = {
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "heads": 4},
    "30m": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 9, "heads": 8},
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "heads": 14,
        "vocab_size": 151_936,
    },
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


@dataclass(frozen=True)
class Work:
    """What every program plays."""

    episodes: int = 16
    turns: int = 20
    group_size: int = 8


@dataclass
class Episode:
    """A script, what to add after each response of which length, and what came of it."""

    ids: list[int]
    observations: list[list[int]]
    lengths: list[int]
    sampled: list[int] = field(default_factory=list)  # positions of sampled tokens in ids
    logprobs: list[float] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)  # where each turn begins in ids

    def prompt(self, window: int | None) -> list[int]:
        """What the policy sees next: everything, or the task and the last ``window`` turns."""
        if window is None or len(self.starts) <= window:
            return self.ids
        return self.ids[: self.starts[0]] + self.ids[self.starts[-window] :]

    def respond(self, turn: int, tokens: list[int], logprobs: Sequence[float] = ()) -> None:
        self.starts.append(len(self.ids))
        self.sampled += range(len(self.ids), len(self.ids) + len(tokens))
        self.logprobs += logprobs
        self.ids = [*self.ids, *tokens, *self.observations[turn]]


def script(work: Work, seed: int = 0) -> list[Episode]:
    rng = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(16, VOCABULARY) for _ in range(rng.randint(low, high))]

    prompts = [tokens(300, 500) for _ in range(-(-work.episodes // work.group_size))]
    counts = [rng.randint(max(1, work.turns // 2), work.turns) for _ in range(work.episodes)]
    return [
        Episode(
            prompts[index // work.group_size],
            [tokens(30, LONGEST_TEXT) for _ in range(count)],
            [rng.randint(SHORTEST, LONGEST) for _ in range(count)],
        )
        for index, count in enumerate(counts)
    ]


def length(episode: Episode) -> int:
    """Tokens of the whole episode, before it is played."""
    return len(episode.ids) + sum(map(len, episode.observations)) + sum(episode.lengths)


def make_model(name: str) -> Qwen2ForCausalLM:
    """Random weights in the shape of ``name``."""
    shape = {"vocab_size": VOCABULARY} | MODELS[name]
    config = Qwen2Config(
        num_attention_heads=shape.pop("heads"),
        num_key_value_heads=2,
        initializer_range=0.05,
        tie_word_embeddings=True,
        max_position_embeddings=16_384,
        **shape,
    )
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config).to(DEVICE, DTYPE).eval()


def plain_sampling(**options: Any) -> GenerationConfig:
    """Exact sampling; the model's own generation config would be merged into less than this."""
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        pad_token_id=0,
        **options,
    )


def pad_left(rows: list[list[int]]) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[0] * (width - len(row)) + row for row in rows], device=DEVICE)


def forked(work: Work, episodes: list[Episode]) -> list[int]:
    """Tokens of each episode that its group's first one has computed: the prompt."""
    return [0 if i % work.group_size == 0 else e.starts[0] for i, e in enumerate(episodes)]


def turns_of(episodes: list[Episode]) -> range:
    return range(max(len(episode.lengths) for episode in episodes))


@torch.no_grad()
def play_generate(
    model: Qwen2ForCausalLM, episodes: list[Episode], until: float = math.inf
) -> None:
    model.generation_config = plain_sampling()
    for turn in turns_of(episodes):
        if time.perf_counter() > until:
            return
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


@torch.no_grad()
def play_continuous(
    model: Qwen2ForCausalLM, episodes: list[Episode], until: float = math.inf
) -> None:
    """Continuous batching; an episode's next turn follows as soon as one has ended."""
    model = copy.copy(model)  # it sets an attention of its own
    # Its own choice of memory is made for a GPU; on a CPU attention pays for every block.
    blocks = sum(-(-length(episode) // PAGE) + 1 for episode in episodes)
    config = ContinuousBatchingConfig(
        page_size=PAGE, num_blocks=blocks, max_batch_tokens=max(512, 2 * len(episodes))
    )
    manager = model.init_continuous_batching(
        plain_sampling(eos_token_id=-1), None if DEVICE == "cuda" else config
    )
    manager.start()
    try:
        turn = dict.fromkeys(range(len(episodes)), 0)
        for i, episode in enumerate(episodes):
            manager.add_request(episode.ids, f"{i}/0", max_new_tokens=episode.lengths[0])
        while turn and time.perf_counter() < until:
            output = manager.get_result(timeout=60)
            if output is None:
                raise RuntimeError("continuous batching gave no result within a minute")
            if not output.is_finished():
                continue
            i = int(output.request_id.split("/")[0])
            episode = episodes[i]
            episode.respond(turn[i], list(output.generated_tokens))
            turn[i] += 1
            if turn[i] == len(episode.lengths):
                del turn[i]
                continue
            manager.add_request(
                episode.ids, f"{i}/{turn[i]}", max_new_tokens=episode.lengths[turn[i]]
            )
    finally:
        manager.stop(block=True)


def play_engine(
    model: Qwen2ForCausalLM,
    episodes: list[Episode],
    until: float = math.inf,
    *,
    share: float = 1.0,
    slots: int | None = None,
    window: int | None = None,
) -> None:
    longest = max(map(length, episodes)) + LONGEST
    if window is not None:
        kept = (window + 1) * (LONGEST + LONGEST_TEXT)
        longest = min(longest, max(len(e.ids) for e in episodes) + kept)
    engine = SlotEngine(slots=slots or len(episodes), max_length=-(-longest // 128) * 128)
    engine.sync(SimpleNamespace(causal_lm=model), version=0)
    play_on(engine, episodes, until, share=share, window=window)


def play_on(
    engine: RolloutEngine,
    episodes: list[Episode],
    until: float = math.inf,
    *,
    share: float = 1.0,
    window: int | None = None,
) -> None:
    """Play on any engine, which has a policy."""
    turn = dict.fromkeys(range(len(episodes)), 0)
    due = list(turn)
    while turn and time.perf_counter() < until:
        engine.submit(
            Request(
                str(i), e.prompt(window), Sampling(1.0, e.lengths[turn[i]]), seed=1000 * turn[i] + i
            )
            for i, e in ((i, episodes[i]) for i in due)
        )
        due = []
        for result in engine.poll(at_least=max(1, int(share * len(turn)))):
            i = int(result.key)
            episodes[i].respond(turn[i], result.tokens, result.logprobs)
            turn[i] += 1
            if turn[i] == len(episodes[i].lengths):
                engine.close(result.key)
                del turn[i]
            else:
                due.append(i)


PLAYERS: dict[str, Callable[..., None]] = {
    "engine": play_engine,
    "engine, overlapping": partial(play_engine, share=0.5),
    "generate": play_generate,
    "continuous batching": play_continuous,
}


def stop_ids(tokenizer: Any) -> list[int]:
    """Many words that end a response: a random model never says the end token."""
    return [int(tokenizer.eos_token_id), *range(16, VOCABULARY, (SHORTEST + LONGEST) // 2)]
