"""One whole iteration, GRPO with AEM, against TRL's GRPOTrainer on the same work.

The same random model, word game, group size and LoRA; one optimizer step on every episode. Ours
plays, scores, estimates, modulates and updates; TRL does what it does in one step, without AEM. The
second iteration is the one that counts. Our shares stand beside the paper's (arXiv 2605.00425,
Fig. 6).

    python benchmarks/bench_step.py
    python benchmarks/bench_step.py --tasks 4 --turns 20 --model 30m --json step.json
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from common import growth_exponent, print_growth, print_table, write_json
from players import LONGEST, MODELS, SHORTEST, make_model, stop_ids
from trl_peer import run_trl, trl_version
from word_world import DONE, WORDS, WordGame

from aem_lightning.algorithms import AEM, GRPO, ClippedLoss
from aem_lightning.datamodules import AgentDataModule
from aem_lightning.envs import TextEnv
from aem_lightning.functional import aem_coefficients
from aem_lightning.modules import (
    AgentModule,
    Lora,
    Policy,
    RolloutSettings,
    UpdateSettings,
    build_tokenizer,
)
from aem_lightning.rollout import Prompt, PromptEncoder, RewardShaping, SlotEngine
from aem_lightning.types import Iteration, Task

KL = 0.01  # above 0: both programs score the reference
PAPER = {
    "rollout": 45.9,
    "old_logprobs": 8.2,
    "ref_logprobs": 8.6,
    "update": 36.0,
    "advantage": 0.2,
    "modulation": 1.1,
}
SPREAD = {"least": min, "median": statistics.median, "most": max}
PLAIN = Prompt(
    opening="{observation}",
    turn="{observation}",
    window="{goal} {history} {observation}",
    history_item="{observation} > {response}",
    action="plain",
)


class WordData(AgentDataModule):
    """Tasks of the word game; two iterations of them."""

    def __init__(self, tasks: int, turns: int) -> None:
        super().__init__(tasks_per_iteration=tasks, iterations_per_epoch=2, workers=1)
        self._make = partial(WordGame, turns=turns)

    def tasks(self, split: str) -> list[Task]:
        return [Task(f"{split}/{number}", "words", split) for number in range(64)]

    def env_factory(self) -> Callable[[], TextEnv]:
        return self._make


class RaggedEncoder(PromptEncoder):
    """A random model never says the end token: many tokens end a response, as they do for TRL."""

    stops: tuple[int, ...] = ()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self.stops


class Record(L.Callback):
    """Keeps every iteration, and what it took."""

    def __init__(self) -> None:
        self.iterations: list[Iteration] = []
        self.seconds: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seconds.append(time.perf_counter() - self._start)
        self.iterations.append(outputs["iteration"])


def run_ours(options: argparse.Namespace, tokenizer: Any, stops: list[int]) -> dict[str, Any]:
    """Our second iteration: seconds in all and by stage, sampled tokens."""
    context = 500 + options.turns * (LONGEST + 82)
    episodes = options.tasks * options.group_size
    encoder = RaggedEncoder(tokenizer, PLAIN, options.memory)
    encoder.stops = tuple(stops)
    r = options.lora_r
    agent = AgentModule(
        Policy(make_model(options.model), tokenizer, Lora(r=r, alpha=2 * r)),
        engine=SlotEngine(slots=episodes, max_length=-(-context // 128) * 128),
        encoder=encoder,
        rewards=RewardShaping(),
        estimator=GRPO(),
        modulation=AEM(),
        loss=ClippedLoss(kl_coef=KL),
        optimizer=partial(torch.optim.AdamW, lr=1e-5),
        rollout=RolloutSettings(
            group_size=options.group_size,
            max_turns=options.turns,
            max_new_tokens=LONGEST,
            max_context=context,
            concurrency=episodes,
        ),
        update=UpdateSettings(num_minibatches=1, micro_batch_tokens=options.micro_batch_tokens),
    )
    record, data = Record(), WordData(options.tasks, options.turns)
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=1,
        limit_val_batches=0,
        logger=False,
        callbacks=[record],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    try:
        trainer.fit(agent, datamodule=data)
    finally:
        data.close()
    done = record.iterations[-1]
    tokens = sum(t.response_tokens for t in done.trajectories)
    return {"step": record.seconds[-1], "seconds": dict(done.seconds), "tokens": tokens}


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """The comparison whose ratio is the median of several, with AEM's cost at the paper's size."""
    reports = [compare_once(options) for _ in range(options.repeats)]
    reports.sort(key=lambda report: report.get("ratio", report["ours"]["step"]))
    report = reports[len(reports) // 2]
    report["ratios"] = [one["ratio"] for one in reports if "ratio" in one]
    report["aem"] = time_modulation(report["ours"])
    return report


def time_modulation(ours: dict[str, Any]) -> dict[str, float]:
    """AEM over 128 episodes of 50 turns, beside a step of that size.

    The step is estimated from the measured seconds a token. Longer histories would add to it and
    fixed costs take from it; ``--tasks 16 --turns 50`` measures the step itself.
    """
    episodes, turns, group_size = 128, 50, 8
    group = torch.arange(episodes).div(group_size, rounding_mode="floor")
    group, entropy = group.repeat_interleave(turns), torch.rand(episodes * turns)
    runs = []
    for _ in range(9):
        start = time.perf_counter()
        aem_coefficients(entropy, group, mask=torch.ones_like(group, dtype=torch.bool))
        runs.append(time.perf_counter() - start)
    tokens = episodes * turns * (SHORTEST + LONGEST) / 2
    step = ours["step"] / ours["tokens"] * tokens
    seconds = statistics.median(runs)
    return {"seconds": seconds, "step": step, "percent": 100 * seconds / step}


def compare_once(options: argparse.Namespace) -> dict[str, Any]:
    """Ours, and TRL's where it is installed, with the ratio per sampled token."""
    tokenizer = build_tokenizer([*WORDS, DONE])
    stops = stop_ids(tokenizer)
    report: dict[str, Any] = {"ours": run_ours(options, copy.deepcopy(tokenizer), stops)}
    if trl_version() is not None:
        settings = {
            "tasks": options.tasks,
            "group_size": options.group_size,
            "turns": options.turns,
            "max_new_tokens": LONGEST,
            "lr": 1e-5,
            "lora_r": options.lora_r,
            "kl": KL,
        }
        game = partial(WordGame, turns=options.turns)
        report["trl"] = vars(run_trl(make_model(options.model), tokenizer, game, settings, stops))
        report["trl"]["version"] = trl_version()
        ours, peer = report["ours"], report["trl"]
        # The programs sample other words, so their episodes differ in length: per token, then.
        report["ratio"] = (peer["step"] / peer["tokens"]) / (ours["step"] / ours["tokens"])
    return report


def growth(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of our iteration as tasks and turns double, and their exponents over the tokens.

    Turns twice, as in the rollout's benchmark: a transcript is read whole for every token, a window
    of two turns does not grow.
    """
    tokenizer = build_tokenizer([*WORDS, DONE])
    costs: dict[str, list[dict[str, Any]]] = {}
    exponents = {}
    doublings = {
        "tasks": ("tasks", "transcript"),
        "turns, transcript": ("turns", "transcript"),
        "turns, window of 2": ("turns", "window"),
    }
    for name, (grown, memory) in doublings.items():
        costs[name] = []
        for factor in options.growth:
            size = {grown: round(factor * getattr(options, grown)), "memory": memory}
            sized = argparse.Namespace(**{**vars(options), **size})
            ours = run_ours(sized, copy.deepcopy(tokenizer), stop_ids(tokenizer))
            costs[name].append(size | ours)
        sizes = [entry["tokens"] for entry in costs[name]]
        exponents[name] = growth_exponent(sizes, [entry["step"] for entry in costs[name]])
        for stage in ("rollout", "update"):
            seconds = [entry["seconds"][stage] for entry in costs[name]]
            exponents[f"{name}, of which {stage}"] = growth_exponent(sizes, seconds)
    return {"costs": costs, "exponents": exponents}


def show(report: dict[str, Any]) -> None:
    ours = report["ours"]
    rows = [("ours", ours["step"], ours["seconds"]["rollout"], ours["tokens"])]
    if "trl" in report:
        trl = report["trl"]
        rows.append((f"trl {trl['version']}", trl["step"], trl["rollout"], trl["tokens"]))
    else:
        print("trl is not installed and is left out: pip install trl")
    print_table("One iteration", ("program", "seconds", "of which rollout", "tokens"), rows)
    if "ratio" in report:
        print(f"  ours is {report['ratio']:.2f} times as fast, per sampled token")
        if len(report["ratios"]) > 1:
            rows = [(name, f(report["ratios"])) for name, f in SPREAD.items()]
            print_table("Times as fast as TRL, per sampled token", ("of all repeats", "x"), rows)
    stages = [
        (name, ours["seconds"][name], 100 * ours["seconds"][name] / ours["step"], share)
        for name, share in PAPER.items()
    ]
    print_table("Where our time goes", ("stage", "seconds", "% ours", "% paper, Fig. 6"), stages)
    aem = report["aem"]
    print_table(
        "AEM over 128 episodes x 50 turns; the step is estimated from its seconds a token",
        ("of", "milliseconds", "step, seconds", "% of the step (at most 0.1)"),
        [("AEM", 1000 * aem["seconds"], aem["step"], aem["percent"])],
    )
    if "growth" in report:
        print_growth("Growth of our seconds, over sampled tokens", report["growth"]["exponents"])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--model", "--size", choices=MODELS, default="tiny")
    parser.add_argument("--memory", choices=["transcript", "window"], default="transcript")
    parser.add_argument("--lora-r", type=int, default=16)
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3, help="the median ratio counts")
    parser.add_argument(
        "--growth", type=float, nargs="*", default=[0.5, 1, 2], help="times the tasks, or the turns"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="where to write the results")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    report = compare(options)
    if len(options.growth) > 1:
        report["growth"] = growth(options)
    show(report)
    write_json(options.json, {"settings": vars(options)} | report)


if __name__ == "__main__":
    main()
