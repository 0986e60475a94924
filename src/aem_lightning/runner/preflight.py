"""Two minutes before training: does the start policy play so that something can be learnt from it?

Everything runs as in training (prompt, engine, temperature, limits) with seeds of its own. Training
ends with the same bits without it: the engine forgets at its next ``sync``, no gradient is left,
and the global random states are put back.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import DictConfig

from aem_lightning.callbacks.aem import forecast, forecast_words
from aem_lightning.callbacks.transcripts import episode_markdown, episode_record
from aem_lightning.datamodules import AgentDataModule
from aem_lightning.files import write_atomically
from aem_lightning.functional.forecast import forecast_sums
from aem_lightning.modules import AgentModule, Policy
from aem_lightning.rollout import make_groups, pack, stable_seed
from aem_lightning.rollout.shortage import is_out_of_memory
from aem_lightning.runner.checkpoints import read_checkpoint
from aem_lightning.runner.preflight_report import Played, advice, expected_hours, share
from aem_lightning.types import EnvStep, ResetRequest, Task

log = logging.getLogger(__name__)

SECONDS = 120.0
PLAY_SECONDS = 75.0  # of them; the rest is for the longest batch
EPISODES = 64  # that are enough
PROBE_TOKENS = 16
REPORT = "preflight.json"
# What ``auto`` goes by: rough speeds of the two kinds of device, and an hour.
_STEP_SECONDS, _FLOPS, _LONG = (2e-3, 25e-3), (5e10, 1e14), 3600.0


def preflight(
    cfg: DictConfig,
    trainer: L.Trainer,
    module: AgentModule,
    datamodule: AgentDataModule,
    checkpoint: Path | None = None,
) -> dict[str, Any] | None:
    """Play, compute the longest batch, and judge; ``None`` where that is not asked for.

    Rank zero does it alone. The report is logged and written to ``preflight.json``.
    """
    if not _is_wanted(cfg, trainer, module, checkpoint) or not trainer.is_global_zero:
        return None
    start = time.monotonic()
    module.to(trainer.strategy.root_device)
    if checkpoint is not None:
        module.load_state_dict(read_checkpoint(checkpoint)["state_dict"], strict=False)
    log.info("preflight: at most %.0f s; preflight=false skips it", SECONDS)
    with isolate_rng(), trainer.precision_plugin.forward_context():
        played = play(cfg, module, datamodule, start + PLAY_SECONDS)
        batch = longest_batch(cfg, module.policy, start + SECONDS)
    by_copy = sorted(played.trajectories, key=lambda trajectory: trajectory.copy)  # three tasks
    shown = [episode_record(trajectory) for trajectory in by_copy[:3]]
    report = {
        **played.report(),
        "longest_batch": batch,
        "hours": expected_hours(cfg, played, batch, datamodule),
        "forecast": _forecast(played),
        "verdict": advice(cfg, played, batch, compares=module.estimator.min_group_size > 1),
        "seconds": time.monotonic() - start,
        "transcripts": shown,
    }
    target = Path(cfg.paths.output_dir) / REPORT
    write_atomically(target, json.dumps(report, indent=2))
    _tell(report, target)
    return report


def expected_seconds(cfg: DictConfig, parameters: int, *, on_gpu: bool) -> float:
    """At most how long a run takes, roughly: its longest episodes at a usual speed."""
    episodes = cfg.tasks_per_iteration * cfg.group_size
    rows = episodes * (1 if cfg.memory == "transcript" else cfg.max_turns)
    passes = 3 + 3 * cfg.update_epochs  # rollout, old and reference scores; a backward pass is two
    decoding = cfg.max_turns * cfg.max_new_tokens * math.ceil(episodes / cfg.concurrency)
    computing = 2.0 * parameters * rows * cfg.max_context * passes
    step, flops = _STEP_SECONDS[on_gpu], _FLOPS[on_gpu]
    return float(cfg.iterations * (decoding * step + computing / flops))


def _is_wanted(
    cfg: DictConfig, trainer: L.Trainer, module: AgentModule, checkpoint: Path | None
) -> bool:
    wish = False if module.policy.sharded else cfg.get("preflight", False)
    if wish != "auto":
        return bool(wish)
    parameters = sum(p.numel() for p in module.policy.parameters())
    on_gpu = trainer.strategy.root_device.type != "cpu"
    return checkpoint is None and expected_seconds(cfg, parameters, on_gpu=on_gpu) > _LONG


def _forecast(played: Played) -> float | None:
    """Whether AEM should help, from whole episodes."""
    whole = played.whole
    return forecast(forecast_sums(pack(whole))) if whole else None


@dataclass
class DeadlinePool:
    """An environment pool whose episodes are over once a deadline has passed.

    Attributes:
        pool: The pool.
        deadline: On the monotonic clock.
        cut: Keys of the episodes that it ended.
    """

    pool: Any
    deadline: float
    cut: set[str] = field(default_factory=set)

    def send(
        self,
        requests: Mapping[str, ResetRequest] | None = None,
        actions: Mapping[str, str] | None = None,
    ) -> None:
        self.pool.send(requests, actions)

    def receive(self) -> Mapping[str, EnvStep]:
        steps: Mapping[str, EnvStep] = self.pool.receive()
        if time.monotonic() < self.deadline:
            return steps
        going = {key for key, step in steps.items() if not (step.terminated or step.truncated)}
        self.cut |= going
        return {k: replace(s, truncated=True) if k in going else s for k, s in steps.items()}

    def release(self, keys: Any) -> None:
        self.pool.release(keys)


def play(
    cfg: DictConfig, module: AgentModule, datamodule: AgentDataModule, deadline: float
) -> Played:
    """Groups of training tasks, wave by wave, until there are enough or time is over."""
    module.engine.sync(module.policy, module.iteration)
    tasks = datamodule.tasks(datamodule.train_split)
    tasks = sorted(tasks, key=lambda task: stable_seed(module.seed, "preflight", task.id))
    settings = module.rollout
    # A response cannot be stopped half way: a slow policy gets fewer tokens.
    few = min(PROBE_TOKENS, settings.max_new_tokens)
    probed = _wave(module, datamodule, tasks[:1], deadline, ("probe",), few, turns=1)
    room = (deadline - time.monotonic()) / 2
    longest = int(room * few / max(probed.seconds, 1e-6))
    tokens = min(settings.max_new_tokens, max(few, longest))
    played = Played(max_turns=settings.max_turns, tokens=tokens)
    size = 1
    while tasks and len(played.trajectories) < EPISODES and time.monotonic() < deadline:
        now, tasks = tasks[:size], tasks[size:]
        wave = _wave(module, datamodule, now, deadline, (len(tasks),), tokens)
        played.add(wave)
        if time.monotonic() + wave.seconds > deadline:
            break
        size = max(1, min(settings.concurrency, EPISODES) // settings.group_size)
    return played


def _wave(
    module: AgentModule,
    datamodule: AgentDataModule,
    tasks: Sequence[Task],
    deadline: float,
    key: tuple[object, ...],
    tokens: int,
    turns: int | None = None,
) -> Played:
    """A group of each of ``tasks``, all of them at once."""
    settings = module.rollout
    start, pool = time.monotonic(), DeadlinePool(datamodule.pool, deadline)
    collector = module.collector(settings.temperature, ("preflight", module.seed, *key), pool)
    collector.episodes_over = None
    collector.max_turns = turns or settings.max_turns
    responder: Any = collector.responder
    responder.sampling = replace(responder.sampling, max_new_tokens=tokens)
    episodes = make_groups(tasks, settings.group_size, 0)
    trajectories = collector.collect(episodes, seed=stable_seed(module.seed, "preflight"))
    cut = {id(trajectory) for trajectory in trajectories if trajectory.key in pool.cut}
    return Played(settings.max_turns, tokens, trajectories, cut, time.monotonic() - start)


def longest_batch(cfg: DictConfig, policy: Policy, deadline: float) -> dict[str, Any]:
    """Seconds and gigabytes of a forward and backward pass of ``micro_batch_tokens`` tokens.

    It starts small. Where time would not be enough, seconds are those of the small one times the
    tokens; ``tokens`` is what was computed. ``fits`` is False where memory ran out.
    """
    length = max(2, min(cfg.max_context, cfg.micro_batch_tokens))
    rows = max(1, cfg.micro_batch_tokens // length)
    small = max(2, length // 8)
    seconds, memory = _pass(policy, 1, small, cfg.temperature)
    found = {"tokens": small, "seconds_per_token": seconds / small, "gigabytes": memory}
    expected = seconds / small * rows * length
    if time.monotonic() + expected > deadline:
        return {**found, "seconds": expected, "fits": None}
    try:
        seconds, memory = _pass(policy, rows, length, cfg.temperature)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return {**found, "seconds": expected, "fits": False}
    tokens = rows * length
    per_token = seconds / tokens
    done = {"tokens": tokens, "seconds_per_token": per_token, "gigabytes": memory}
    return {**done, "seconds": seconds, "fits": True}


def _pass(policy: Policy, rows: int, length: int, temperature: float) -> tuple[float, float]:
    """Seconds and peak gigabytes of a pass over random tokens; it leaves no gradient."""
    device = policy.causal_lm.device
    weight: Any = policy.causal_lm.get_input_embeddings().weight
    vocabulary = len(weight)
    ids = torch.randint(vocabulary, (rows, length), device=device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    with _peak_memory(device) as gigabytes:
        start = time.monotonic()
        try:
            logprobs, _ = policy.score(ids, mask, temperature)
            (-logprobs.mean()).backward()
        finally:
            policy.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.monotonic() - start
    return seconds, gigabytes[0]


@contextlib.contextmanager
def _peak_memory(device: torch.device) -> Iterator[list[float]]:
    """The most memory in use inside: of the GPU, or of this process so far."""
    found = [0.0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    if device.type == "cuda":
        found[0] = torch.cuda.max_memory_allocated(device) / 1e9
    else:
        import resource  # of Unix alone, as the project is

        found[0] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _tell(report: Mapping[str, Any], target: Path) -> None:
    """The report in the log: a few lines, three episodes, the verdict last."""
    for record in report["transcripts"]:
        log.info("preflight, an episode:\n%s", episode_markdown(record, max_chars=400))
    batch, cut = report["longest_batch"], report["cut_by"]
    log.info(
        "preflight: %d episodes of %d groups, %d of them whole; success %s, groups mixed %s; "
        "replies malformed %s, inadmissible %s; cut by max_new_tokens %s, max_turns %s, "
        "max_context %s",
        *(report[name] for name in ("episodes", "groups", "whole")),
        *map(share, (report["success"], report["mixed_groups"])),
        *map(share, (report["malformed"], report["inadmissible"])),
        *(share(cut[name]) for name in ("max_new_tokens", "max_turns", "max_context")),
    )
    log.info(
        "preflight: longest batch %.1f s, %.1f GB; the run takes about %s h; %s",
        batch["seconds"],
        batch["gigabytes"],
        "?" if report["hours"] is None else f"{report['hours']:.1f}",
        target,
    )
    log.info("preflight: %s", forecast_words(report["forecast"]))
    verdict = report["verdict"]
    level = logging.WARNING if verdict["bad"] else logging.INFO
    log.log(level, "preflight verdict %s: %s", verdict["name"], verdict["text"])
