"""The whole algorithm on one page: GRPO with AEM on LoRA adapters, in plain torch.

    python examples/loop.py      # about a minute on one core; a number behind it is another seed

Read it from top to bottom: settings, a game, a policy, the stages, the loop. The stages bear the
names that they have in `AgentModule.training_step`, and come in its order. It is no toy: three
iterations of this page and of that module leave the same bits in the weights, as a test proves. The
module adds what a page can do without: more GPUs, validation, checkpoints, other algorithms.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from aem_lightning.functional import aem_coefficients, clipped_surrogate, grpo_advantages, kl_k3
from aem_lightning.modules import Architecture, Lora, Policy, build_tiny_model, build_tokenizer
from aem_lightning.modules.memory import TokenBudget
from aem_lightning.modules.scoring import MicroBatch, score_rows
from aem_lightning.rollout import (
    Collector,
    EngineResponder,
    Prompt,
    PromptEncoder,
    RewardShaping,
    Sampling,
    SlotEngine,
    make_groups,
    minibatches,
    pack,
    stable_seed,
)
from aem_lightning.types import EnvStep, RolloutBatch, Task, Trajectory

# ----------------------------------------------------------------------------------------- settings

ITERATIONS = 24
GROUP_SIZE = 8  # copies of a task, compared with each other
MAX_TURNS = 6
MAX_NEW_TOKENS = 2  # a word and the end token
MAX_CONTEXT = 32
CONCURRENCY = 320  # as many as are ever played at once, so nobody waits for a slot
TEMPERATURE = 1.0
NUM_MINIBATCHES = 2  # optimizer steps of the only update epoch; the second one is off-policy
CLIP = 0.2
KL_COEF = 0.01  # over 0, so every row has a gradient and none can be left out
LR = 3e-3
MAX_GRAD_NORM = 1.0
BUDGET = TokenBudget(16384, packed=False)  # padding costs little where rows are about as long
REWARDS = RewardShaping(success=1.0, malformed=-0.1, inadmissible=-0.1)
ARCHITECTURE = Architecture(64, 128, num_hidden_layers=2, num_attention_heads=2)

# --------------------------------------------------------------------------------------------- game

ROOMS = 5
ACTIONS = ("west", "take", "east")
SIGHTS = ("the coin is west", "the coin is here", "the coin is east")
TASKS = [Task(f"{you}-{coin}") for you in range(ROOMS) for coin in range(ROOMS) if you != coin]


class CoinInARow:
    """Like a `TextEnv`: rooms in a row, a coin in one of them; the task id says where both are."""

    def reset(self, *, seed=None, options=None):
        self.you, self.coin = map(int, options["task_id"].split("-"))
        return self.sight(), self.info("west")

    def step(self, action, /):
        won = action == "take" and self.you == self.coin
        to = self.you + {"west": -1, "east": 1}.get(action, 0)
        self.you = min(max(to, 0), ROOMS - 1)
        return self.sight(), float(won), won, False, self.info(action, won)

    def sight(self):
        return SIGHTS[(self.coin > self.you) - (self.coin < self.you) + 1]

    def info(self, action, won=False):
        return {"is_action_valid": action in ACTIONS, "won": won}


class Games:
    """Games in play, by key. This one answers at once; `EnvPool` keeps slow ones in processes."""

    def __init__(self):
        self.games, self.steps = {}, {}

    def send(self, requests, actions):
        for key, request in requests.items():
            self.games[key] = CoinInARow()
            sight, info = self.games[key].reset(options={"task_id": request.task_id})
            self.steps[key] = EnvStep(sight, info=info)
        for key, action in actions.items():
            self.steps[key] = EnvStep(*self.games[key].step(action))

    def receive(self):
        steps, self.steps = self.steps, {}
        return steps

    def release(self, keys):
        for key in keys:
            del self.games[key]


# ------------------------------------------------------------------------------------------- policy

TOKENIZER = build_tokenizer([*SIGHTS, *ACTIONS])
PROMPT = Prompt(*["{observation}"] * 3, action="plain")  # the sight says all: no history, no goal
ENCODER = PromptEncoder(TOKENIZER, PROMPT, memory="window", history_length=0)
ENGINE = SlotEngine(CONCURRENCY, MAX_CONTEXT, bucket=32)  # keeps keys and values between turns


def make_policy(seed: int) -> Policy:
    """A tiny base model under new LoRA adapters; a real one is `Policy.from_pretrained`.

    Sixty supervised steps teach the base to play carelessly: every action as often, but the right
    one twice. It stands for a language model that knows the words and hardly the game.
    """
    base = build_tiny_model(TOKENIZER, ARCHITECTURE, seed)
    speaker = Policy(base, TOKENIZER)
    shown = [*product(SIGHTS, ACTIONS), *zip(SIGHTS, ACTIONS, strict=True)]
    rows = [ENCODER.first(EnvStep(sight)) + ENCODER.demonstrate(word) for sight, word in shown]
    input_ids = torch.tensor(rows)  # [12, L]: every sight has as many words
    mask = torch.zeros_like(input_ids, dtype=torch.bool)
    mask[:, -MAX_NEW_TOKENS:] = True
    optimizer = torch.optim.AdamW(speaker.parameters(), lr=3e-3)
    for _ in range(60):
        logprobs, _ = speaker.score(input_ids, mask)
        optimizer.zero_grad()
        (-logprobs.mean()).backward()
        optimizer.step()
    torch.manual_seed(seed)  # PEFT draws the adapters from the global stream
    return Policy(base, TOKENIZER, Lora(r=8, alpha=16))


# ------------------------------------------------------------------------------------------- stages


def collect(tasks: Sequence[Task], copies: int, key: tuple, seed: int = 0) -> list[Trajectory]:
    """``copies`` trajectories of each task; ``key`` fixes every draw, ``seed`` the games."""
    sampling = Sampling(TEMPERATURE, MAX_NEW_TOKENS, ENCODER.stop_ids)
    collector = Collector(
        pool=Games(),
        encoder=ENCODER,
        responder=EngineResponder(ENGINE, sampling, key, share=1.0),  # all take turns together
        rewards=REWARDS,
        max_turns=MAX_TURNS,
        max_context=MAX_CONTEXT,
        max_new_tokens=MAX_NEW_TOKENS,
        concurrency=CONCURRENCY,
    )
    return collector.collect(make_groups(tasks, copies), seed=seed)


def estimate(rollouts: RolloutBatch) -> Tensor:
    """One advantage a response, [R]: how much better its trajectory did than its group."""
    return grpo_advantages(rollouts.returns, rollouts.group)[rollouts.trajectory]


def score(policy: Policy, rollouts: RolloutBatch, plan: list[list[int]]) -> None:
    """Log-probabilities of what was sampled, [S, L]: before the update, and of the reference.

    The engine has the first ones too, but rounded as its own batches round: not a ratio of 1.
    """
    rollouts.old_logprobs, _ = score_rows(policy, rollouts, plan, TEMPERATURE, BUDGET)
    with policy.reference():  # the base, for its adapters are off
        rollouts.ref_logprobs, _ = score_rows(policy, rollouts, plan, TEMPERATURE, BUDGET)


def modulate(rollouts: RolloutBatch, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """AEM: alpha [R], by the entropies that the engine saw, and the advantages times alpha."""
    alpha = aem_coefficients(rollouts.entropy, rollouts.response_group)
    return alpha, alpha * advantages


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    rollouts: RolloutBatch,
    advantages: Tensor,
    plan: list[list[int]],
) -> None:
    """One clipped step for each minibatch of the plan."""
    for rows in plan:
        policy.zero_grad()
        tokens = (rollouts.response_index[rows] >= 0).sum()
        for micro in BUDGET.cut(rows, rollouts.row_length):  # as many rows as memory holds
            piece = MicroBatch.cut(rollouts, micro)  # its T response tokens
            logprobs, _ = piece.score(policy, TEMPERATURE, packed=False)  # [T]
            old, reference = map(piece.gather, (rollouts.old_logprobs, rollouts.ref_logprobs))
            spread = advantages[piece.responses]  # a response's advantage is that of its tokens
            surrogate, _ = clipped_surrogate(logprobs, old, spread, clip_low=CLIP, clip_high=CLIP)
            loss = surrogate.sum() + KL_COEF * kl_k3(logprobs, reference).sum()
            (loss / tokens).backward()  # the minibatch's mean, however it was cut
        torch.nn.utils.clip_grad_norm_(policy.trainable().values(), MAX_GRAD_NORM)
        optimizer.step()


def success(trajectories: Sequence[Trajectory]) -> float:
    """The share of episodes that were won."""
    return sum(trajectory.won for trajectory in trajectories) / len(trajectories)


def report(iteration: int, trajectories: list[Trajectory], entropy: Tensor, alpha: Tensor) -> None:
    """A line of the iteration."""
    print(
        f"iteration {iteration:2d}: success {success(trajectories):4.0%}, "
        f"entropy {entropy.mean():.2f}, alpha {alpha.min():.2f} to {alpha.max():.2f}"
    )


def train(policy: Policy, seed: int, iterations: int = ITERATIONS) -> None:
    """Train the adapters of ``policy``: what `AgentModule.training_step` does, again and again."""
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=LR, weight_decay=0.0)
    for iteration in range(iterations):
        tasks = TASKS.copy()  # few enough to play all of them in every iteration
        random.Random(f"{seed}/{iteration}").shuffle(tasks)
        ENGINE.sync(policy, iteration)
        key = ("train", seed, iteration, 0)  # 0: the only rank
        trajectories = collect(tasks, GROUP_SIZE, key, stable_seed(seed, iteration))
        rollouts = pack(trajectories, ENCODER.pad_id)
        advantages = estimate(rollouts)
        generator = torch.Generator().manual_seed(stable_seed(seed, iteration, 0, "plan"))
        plan = minibatches(len(rollouts.row_length), NUM_MINIBATCHES, generator)
        score(policy, rollouts, plan)
        alpha, scaled = modulate(rollouts, advantages)
        if advantages.any():  # else every group is uniform, and there is nothing to learn
            update(policy, optimizer, rollouts, scaled, plan)
        report(iteration, trajectories, rollouts.entropy, alpha)


def evaluate(policy: Policy, seed: int) -> float:
    """Success on the training tasks: this page shows that it learns, not that it generalises."""
    ENGINE.sync(policy, 0)
    return success(collect(TASKS, 16, ("evaluation", seed)))


if __name__ == "__main__":
    torch.set_num_threads(1)  # in so small a model a second thread only waits for the first
    seed, started = int([*sys.argv, "0"][1]), time.perf_counter()
    policy = make_policy(seed)
    before = evaluate(policy, seed)
    train(policy, seed)
    after, seconds = evaluate(policy, seed), time.perf_counter() - started
    print(f"seed {seed}: success {before:.1%} before, {after:.1%} after; {seconds:.0f} s")
