"""Whole iterations of the real command, and what they cost."""

from __future__ import annotations

import contextlib
import csv
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig
from peft.helpers import disable_input_dtype_casting

from aem_lightning.gpu_check.decoding import wait
from aem_lightning.gpu_check.piece import Check, Figures
from aem_lightning.gpu_check.shapes import composed, games, model_folder
from aem_lightning.modules import AgentModule
from aem_lightning.rollout.slot_model import SlotModel
from aem_lightning.runner.build import build_agent, build_datamodule, build_policy, build_trainer
from aem_lightning.types import Iteration

GIB = 2**30
CURVES = ("train/success_rate", "policy/approx_kl", "policy/clip_fraction", "policy/sampler_gap")
# Two runs of one seed part on a GPU only by the order in which kernels add.
CLOSE = 0.1
# What makes the paper's iteration a matter of minutes.
SHORT = ("max_turns=6", "max_new_tokens=128", "iterations=1", "iterations_per_epoch=1")
TINY = (
    "tasks_per_iteration=2",
    "group_size=2",
    "max_turns=2",
    "max_new_tokens=8",
    "max_context=1024",
    "concurrency=4",
)


def quickstart(check: Check) -> Figures:
    """Two runs of the quickstart with one seed: their curves lie close to each other."""
    (curves, seconds), (again, _) = (_quickstart(check, f"quickstart_{n}") for n in (1, 2))
    apart = {
        name: max((abs(a - b) for a, b in zip(curves[name], again[name], strict=False)), default=9)
        for name in CURVES
    }
    far = [f"{name} by {value:.3f}" for name, value in apart.items() if value > CLOSE]
    wrong = f"two runs of one seed part: {', '.join(far)}" if far else None
    if not curves["policy/approx_kl"]:
        wrong = "no iteration made an update"
    return {"red": wrong, "curves": curves, "apart": apart, "step_time": seconds}


def _quickstart(check: Check, name: str) -> tuple[dict[str, list[float]], Any]:
    """The curves of one run, and its table of seconds."""
    folder = check.folder / "runs" / name
    small = [
        *("policy.warm_start.demonstrations=24", "policy.warm_start.epochs=1", "iterations=2"),
        *("policy.architecture.hidden_size=32", "policy.architecture.intermediate_size=64"),
        *("tasks_per_iteration=2", "group_size=4", "max_turns=4"),
        "loss.entropy_coef=0.01",  # a policy that has hardly learnt to play earns nothing
    ]
    words = [
        *("experiment=quickstart", "trainer=gpu", "iterations=5", *games(check)[1:]),
        *("callbacks=default", "logger=csv", f"paths.output_dir={folder}"),
        *(small if check.small else []),
    ]
    run_script(check, ["train.py", *words], folder)
    rows = list(csv.DictReader((folder / "csv" / "metrics.csv").open(encoding="utf-8")))
    curves = {name: [float(row[name]) for row in rows if row.get(name)] for name in CURVES}
    return curves, json.loads((folder / "step_time.json").read_text(encoding="utf-8"))


def run_script(check: Check, words: Sequence[str], folder: Path) -> None:
    """Run a script of the checkout, in a process of its own.

    Raises:
        RuntimeError: It failed; with its last line.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, *words], cwd=check.root, capture_output=True, text=True, check=False
    )
    (folder / "output.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        last = said[-1] if said else "nothing"
        raise RuntimeError(f"{words[0]} ended with exit status {done.returncode}: {last}")


def paper(check: Check, *, casts: bool = True) -> Figures:
    """An iteration of the paper's ALFWorld run with the 1.5B shape.

    ``casts`` are those that PEFT makes of what goes into adapters.
    """
    small = TINY if check.small else ()
    cfg = composed(check, "paper", f"policy.model={model_folder(check, '1.5b')}", *SHORT, *small)
    return measured(cfg, check, casts=casts)


def four_bits(check: Check) -> Figures:
    """Eight episodes of three turns and an update with the 7B shape in nf4."""
    small = ["tasks_per_iteration=2", "group_size=4", "max_turns=3"]
    if check.small:  # bitsandbytes lays out a CPU's weights for inference: no gradient passes
        small = [*TINY, "policy.quantization=null"]
    places = (f"policy.model={model_folder(check, '7b')}", "policy=qwen2_5_7b_qlora")
    few = ("concurrency=8", "num_minibatches=2", "max_new_tokens=128")
    words = [*places, "iterations=1", "iterations_per_epoch=1", *few, *small]
    return measured(composed(check, "four_bits", *words), check)


def measured(cfg: DictConfig, check: Check, *, casts: bool = True) -> Figures:
    """One iteration of ``cfg``: seconds, tokens a second and peak memory of its stages."""
    before = resident()
    with agent_of(cfg) as (trainer, module, datamodule):
        costs = Costs(module, check)
        trainer.callbacks.append(costs)  # type: ignore[attr-defined]
        quiet = disable_input_dtype_casting(module.policy.causal_lm, active=not casts)
        with quiet, costs.of_passes():
            trainer.fit(module, datamodule=datamodule)
        figures = costs.figures()
    broken = None if costs.updated else "the iteration made no update"
    return {"red": broken, **figures, "host_gib": [before / GIB, resident() / GIB]}


@contextlib.contextmanager
def agent_of(cfg: DictConfig) -> Iterator[tuple[L.Trainer, AgentModule, Any]]:
    """The trainer, the agent and the tasks of a config; all of it ends with the context."""
    L.seed_everything(cfg.seed, verbose=False)
    datamodule = build_datamodule(cfg)
    try:
        policy, _ = build_policy(cfg, datamodule)
        module = build_agent(cfg, policy, datamodule)
        # Random weights earn nothing, so every group would be uniform, and nothing to be learnt.
        module.rewards = Alternating()  # type: ignore[assignment]
        yield build_trainer(cfg), module, datamodule
    finally:
        datamodule.close()


class Alternating:
    """A reward that differs from turn to turn, whatever was done."""

    environment = False

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, step: Any, *, malformed: bool) -> float:
        self._count += 1
        return float(self._count % 3 == 0)


class Costs(L.Callback):
    """Seconds of prefill and decoding, tokens and peak memory of the stages of an iteration."""

    def __init__(self, module: AgentModule, check: Check) -> None:
        self._check = check
        self._passes = {"prefill": 0.0, "decode": 0.0}
        self._tokens = {"prefill": 0, "decode": 0}
        self._shapes: set[tuple[int, int, int]] = set()
        self._peaks: dict[str, float] = {}
        self._done: Iteration | None = None
        for stage in ("collect", "score", "update"):
            setattr(module, stage, partial(self._stage, stage, getattr(module, stage)))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        """Keep the iteration."""
        self._done = outputs["iteration"]

    @property
    def updated(self) -> bool:
        """Whether there was an update."""
        return self._done is not None and self._done.skipped is None

    def _stage(self, name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._check.small:
            torch.cuda.reset_peak_memory_stats()
        result = call(*args, **kwargs)
        if not self._check.small:
            self._peaks[name] = torch.cuda.max_memory_allocated() / GIB
        return result

    @contextlib.contextmanager
    def of_passes(self) -> Iterator[None]:
        """Inside, the engine's forward passes are timed one by one."""
        forward = SlotModel.forward

        def timed(model: SlotModel, rows: Any, starts: Any, chunks: Any) -> Any:
            width = max(map(len, chunks))
            kind = "prefill" if width > 1 else "decode"
            if width > 1:
                self._shapes.add((len(rows), width, max(starts) + width))
            wait(self._check)
            start = time.perf_counter()
            logits = forward(model, rows, starts, chunks)
            wait(self._check)
            self._passes[kind] += time.perf_counter() - start
            self._tokens[kind] += sum(map(len, chunks))
            return logits

        SlotModel.forward = timed  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            SlotModel.forward = forward  # type: ignore[method-assign]

    def figures(self) -> Figures:
        """What was measured."""
        assert self._done is not None
        tokens = int(self._done.batch.row_length.sum())
        stages = {"old_logprobs": tokens, "ref_logprobs": tokens, "update": tokens}
        seconds = self._done.seconds
        rates = {stage: count / seconds[stage] for stage, count in stages.items() if seconds[stage]}
        rates |= {kind: self._tokens[kind] / (s or 1.0) for kind, s in self._passes.items()}
        names = ("policy/approx_kl", "policy/clip_fraction", "policy/sampler_gap")
        return {
            "seconds": {**seconds, **self._passes},
            "tokens_a_second": rates,
            "tokens_of_rows": tokens,
            "peak_gib": self._peaks,
            "prefill_shapes_asked_for": len(self._shapes),
            **{name: self._done.metrics.get(name) for name in names},
        }


def resident() -> int:
    """Bytes of this process in the host's memory; 0 where the system does not say."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * 4096 if status.exists() else 0
