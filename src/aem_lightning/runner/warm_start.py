"""The warm-start stage: expert play, supervised training, and a model folder kept by its config."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Formatter
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import LambdaCallback
from torch.utils.data import DataLoader

from aem_lightning.callbacks import Meter
from aem_lightning.datamodules import AgentDataModule
from aem_lightning.files import sync_tree
from aem_lightning.modules import (
    Architecture,
    DemonstrationSampler,
    Policy,
    WarmStartModule,
    WarmStartSettings,
    build_tiny_model,
    build_tokenizer,
    collate_demonstrations,
    demonstrations_dataset,
    uses_gpu,
)
from aem_lightning.modules.self_check import CHECKED, self_check
from aem_lightning.rollout import (
    Collector,
    Episode,
    ExpertResponder,
    Prompt,
    PromptEncoder,
    RewardShaping,
    stable_seed,
)
from aem_lightning.rollout.shortage import in_stage
from aem_lightning.rollout.tool_call import example
from aem_lightning.runner.demonstrations import read_demonstrations
from aem_lightning.types import Trajectory

log = logging.getLogger(__name__)

# Raise it when the stage changes what it makes: older folders are then not taken for new ones.
FORMAT = 8
RESULT = "warm_start.json"


@dataclass(frozen=True)
class WarmStart:
    """What the stage left: a Hugging Face model folder, and what it took to make it."""

    folder: Path
    cached: bool
    seconds: float
    report: Mapping[str, Any]


def finished(folder: Path) -> WarmStart | None:
    """What an earlier run left in ``folder``, where that is complete."""
    result = folder / RESULT
    if not result.exists():
        return None
    return WarmStart(folder, True, 0.0, json.loads(result.read_text(encoding="utf-8")))


def warm_start_key(*parts: Any) -> str:
    """A short hash of everything that the result depends on."""
    text = json.dumps([FORMAT, *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def tiny_base(
    datamodule: AgentDataModule,
    architecture: Architecture,
    seed: int,
    prompt: Prompt | None = None,
) -> Policy:
    """A policy with random weights, whose words are the environment's, expert's and prompt's."""
    thinks = prompt is not None and "{thought}" in prompt.demonstration
    thoughts = datamodule.thoughts() if thinks else []
    texts = [*datamodule.vocabulary(), *thoughts, *_template_texts(prompt)]
    tokenizer = build_tokenizer(texts)
    return Policy(build_tiny_model(tokenizer, architecture, seed), tokenizer)


def _template_texts(prompt: Prompt | None) -> list[str]:
    """What the templates of ``prompt`` write themselves, cut where a field is filled in."""
    if prompt is None:
        return []
    templates = (prompt.opening, prompt.turn, prompt.window, prompt.history_item)
    tools = prompt.tools if prompt.action == "tool_call" else ()
    return [
        prompt.role,
        prompt.system or "",
        *(str(tool["function"].get("description", "")) for tool in tools),
        *map(example, tools),
        *(
            literal
            for template in (*templates, prompt.demonstration)
            for literal, *_ in Formatter().parse(template)
        ),
    ]


def play_demonstrations(
    datamodule: AgentDataModule,
    encoder: PromptEncoder,
    settings: WarmStartSettings,
    rewards: RewardShaping,
    limits: Mapping[str, Any],
) -> tuple[list[Trajectory], set[tuple[str, int]]]:
    """Expert episodes on training tasks, won unless losses count too, and their slips by turn.

    Tasks are taken in a seeded order, again when they are few.
    """
    tasks = datamodule.tasks(datamodule.train_split)
    order = sorted(tasks, key=lambda task: stable_seed(settings.seed, "demonstrations", task.id))
    episodes = [Episode(order[i % len(order)], i, 0) for i in range(settings.demonstrations)]
    responder = ExpertResponder(
        encoder,
        lambda episode: datamodule.make_expert(
            episode.task, stable_seed(settings.seed, episode.task.id, episode.group) % 2**31
        ),
        settings.slip,
        settings.seed,
    )
    with Meter("warm start, expert play", len(episodes)) as meter:
        collector = Collector(
            datamodule.pool, encoder, responder, rewards, **limits, episodes_over=meter.played
        )
        played = collector.collect(episodes, seed=settings.seed)
    won = [trajectory for trajectory in played if trajectory.won or settings.imitate_losses]
    if not won:
        raise ValueError(
            f"The expert won none of {len(episodes)} episodes within "
            f"max_turns={limits['max_turns']}, so there is nothing to learn from. Type a larger "
            "policy.warm_start.max_turns=..."
        )
    limit = limits["max_new_tokens"]
    longest = [max(trajectory.turns, key=lambda turn: turn.length) for trajectory in won]
    cut = sorted((turn for turn in longest if turn.length > limit), key=lambda turn: turn.length)
    if 2 * len(cut) > len(won):
        raise ValueError(
            f"max_new_tokens={limit} cuts a response in {len(cut)} of {len(won)} games that the "
            f"expert won, so the policy could not say it: {cut[-1].response!r} has "
            f"{cut[-1].length} tokens. Type max_new_tokens={cut[-1].length}"
        )
    log.info("expert play: %d of %d episodes won", len(won), len(episodes))
    return won, responder.slips


def run_warm_start(
    base: Policy,
    datamodule: AgentDataModule,
    encoder: PromptEncoder,
    settings: WarmStartSettings,
    *,
    rewards: RewardShaping,
    limits: Mapping[str, int],
    folder: Path,
    trainer: Mapping[str, Any],
) -> WarmStart:
    """Train ``base`` on expert play or recorded chats and save it; a whole ``folder`` is kept."""
    if (done := finished(folder)) is not None:
        return done
    start = time.perf_counter()
    base.to("cuda" if uses_gpu(trainer["accelerator"]) else "cpu")
    if base not in CHECKED:
        self_check(base, packing="padded")
    if settings.demonstrations_from is None:
        played, slips = play_demonstrations(datamodule, encoder, settings, rewards, limits)
        dataset = demonstrations_dataset(played, set() if settings.imitate_slips else slips)
        counts = {"demonstrations": len(played), "turns": sum(len(t.turns) for t in played)}
    else:
        dataset = read_demonstrations(settings.demonstrations_from, encoder, limits["max_context"])
        counts = {"demonstrations": len(dataset)}
    seconds_play = time.perf_counter() - start
    sampler = DemonstrationSampler(
        [len(row) for row in dataset["input_ids"]], settings.batch_tokens, settings.seed
    )
    loader: DataLoader[Any] = DataLoader(
        dataset, batch_sampler=sampler, collate_fn=collate_demonstrations
    )
    batches = settings.epochs * len(sampler)
    module = WarmStartModule(base, settings.lr, batches, settings.prompt_weight)
    with Meter("warm start, imitation", batches, "batches") as meter:
        fit = L.Trainer(
            **trainer,
            max_epochs=settings.epochs,
            gradient_clip_val=settings.max_grad_norm,
            enable_checkpointing=False,
            use_distributed_sampler=False,
            callbacks=LambdaCallback(
                on_train_batch_end=lambda trainer, module, outputs, *_: meter.add(
                    note=f"loss {outputs['loss']:.3f}"
                )
            ),
        )
        with in_stage("the warm start", policy__warm_start__batch_tokens=settings.batch_tokens):
            fit.fit(module, loader)
    seconds = time.perf_counter() - start
    report = {
        "settings": asdict(settings),
        **counts,
        "rows": len(dataset),
        "loss": float(fit.callback_metrics["warm_start/loss"]),
        "seconds_play": seconds_play,
        "seconds": seconds,
    }
    log.info("warm start: loss %.3f after %d batches, %s", report["loss"], batches, folder)
    _save(base, folder, report)
    return WarmStart(folder, False, seconds, report)


def _save(policy: Policy, folder: Path, report: Mapping[str, Any]) -> None:
    """Write beside the target, then rename: a folder with a result file is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        policy.save_model(partial)
        (partial / RESULT).write_text(json.dumps(report, indent=2), encoding="utf-8")
        sync_tree(partial)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # half a model is a disk's worth of nothing
        raise
