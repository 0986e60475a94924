"""The table of faults: what is injected, and what has to be seen of it."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fake_endpoint
import lightning as L
import psutil
import torch
from runs import COIN

from faults.environment import ALWAYS, ONCE
from faults.forks import Try, command, last_checkpoint


def same_bits(found: Path, expected: Path) -> bool:
    """Whether two checkpoints hold the same weights, optimizer states and iterations."""
    parts = [torch.load(path, weights_only=True) for path in (found, expected)]
    try:
        for name in ("state_dict", "optimizer_states"):
            torch.testing.assert_close(*(part[name] for part in parts), rtol=0, atol=0)
    except AssertionError:
        return False
    return bool(parts[0]["aem_lightning"]["iteration"] == parts[1]["aem_lightning"]["iteration"])


# --------------------------------------------------------------------------------- how one is tried


def environment(fault: str, this: Try) -> tuple[str, str]:
    """A run whose environment breaks: where that comes once it must end with the same bits."""
    words = (
        "datamodule._target_=faults.environment.FaultyDataModule",
        f"+datamodule.fault='{fault}'",
        f"+datamodule.fault_seed={this.seed}",
        f"+datamodule.marker={this.folder}/met",
        "+datamodule.timeout_s=2",
    )
    ended = this.train(*words)
    if ended.how != "went on" or fault in ALWAYS:
        return ended.how, ended.last_line if ended.how != "went on" else "episodes of one task"
    same = same_bits(last_checkpoint(this.folder), this.undisturbed())
    return ("bit-equal", "nothing") if same else ("other bits", "the run's identity")


def interrupted(
    this: Try, signals: Callable[[random.Random], list[tuple[float, int]]], **how: Any
) -> tuple[str, str]:
    """A run that is ended somewhere, then continued to its end: it must have the same bits."""
    first = this.train(signals=signals(this.rng), **how)
    if first.how not in ("stopped", "went on", "named error"):
        return first.how, first.last_line
    checkpoints = list(this.folder.rglob("last.ckpt"))
    if first.how != "went on":
        ended = this.train(*(["ckpt_path=last"] if checkpoints else []))
        if ended.how != "went on":
            return f"resumed: {ended.how}", ended.last_line
    same = same_bits(last_checkpoint(this.folder), this.undisturbed())
    return ("bit-equal", "nothing") if same else ("other bits", "the run's identity")


def damaged(damage: Callable[[Path, random.Random], object], this: Try) -> tuple[str, str]:
    """A run that is to go on from a file in which something is wrong."""
    path = this.folder / "damaged.ckpt"
    shutil.copy(this.undisturbed(), path)
    damage(path, this.rng)
    ended = this.train(f"ckpt_path={path}")
    named = ended.how == "named error" and str(path) in ended.said
    return ("named error", "nothing") if named else (ended.how, ended.last_line)


def typed(key: str, words: Sequence[str], this: Try) -> tuple[str, str]:
    """A command line with a value that cannot be: the error names its key."""
    ended = this.train(*words)
    if ended.how == "named error" and key not in ended.said:
        return "error without its key", ended.last_line
    return ended.how, "nothing" if ended.how == "named error" else ended.last_line


def server(think: Callable[[Any], Any], this: Try) -> tuple[str, str]:
    """An evaluation of a model whose server misbehaves in every third answer."""
    count = iter(range(10**6))
    with fake_endpoint.serving(lambda body: think(body) if next(count) % 3 == 1 else "x") as fake:
        words = ["policy=api", "model=m", f"base_url={fake.url}", "datamodule=coin", COIN[2]]
        limits = ["max_turns=2", "timeout_s=2", "max_retries=2", "prompt=plain"]
        ended = command("eval.py", *words, *limits, f"paths.root_dir={this.folder}")
    return ended.how, "nothing" if ended.how == "went on" else ended.last_line


class Poison(L.Callback):
    """Puts ``value`` into a number of the policy, or of its optimizer, at the second iteration."""

    def __init__(self, value: float, place: str) -> None:
        self._value, self._place = value, place

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if pl_module.iteration == 1:
            weight = next(iter(pl_module.policy.trainable().values()))
            states = trainer.optimizers[0].state
            target = weight if self._place == "weight" else states[weight]["exp_avg"]
            target.data.view(-1)[0] = self._value


class Soak(L.Callback):
    """Breaks a worker in each tenth iteration, and writes down what this process holds."""

    def __init__(self, series: str) -> None:
        self._series = Path(series)
        self._random = random.Random(0)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        pool = trainer.datamodule.pool  # type: ignore[attr-defined]
        if pl_module.iteration % 10 == 9:
            os.kill(self._random.choice(pool.worker_pids()), self._random.choice(BREAKS))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        me = psutil.Process()
        row = {
            "iteration": pl_module.iteration,
            "megabytes": me.memory_info().rss / 2**20,
            "descriptors": me.num_fds(),
            "children": len(me.children(recursive=True)),
        }
        with self._series.open("a") as lines:
            lines.write(json.dumps(row) + "\n")


# --------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Kind:
    """A fault by its name: how it is tried, and what may be seen."""

    area: str
    name: str
    run: Callable[[Try], tuple[str, str]]
    must: tuple[str, ...]


def nth(function: str, number: int, does: Callable[[], object]) -> None:
    """Let the ``number``-th call of ``os.<function>`` do something else first."""
    calls, real = iter(range(10**6)), getattr(os, function)
    setattr(os, function, lambda *a, **k: (next(calls) == number and does(), real(*a, **k))[1])


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def flip(path: Path, rng: random.Random, low: float = 0.0, high: float = 1.0) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(int(low * len(data)), int(high * len(data)))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(1, path.stat().st_size))


def without(key: str, path: Path, rng: random.Random) -> None:
    stored = torch.load(path, weights_only=True)
    del stored[key]
    torch.save(stored, path)


class Run:
    """What a stranger's checkpoint runs where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.abort, ()


DAMAGES: dict[str, Callable[[Path, random.Random], object]] = {
    "bit flipped anywhere": flip,
    "bit flipped at the beginning": partial(flip, high=0.05),
    "bit flipped at the end": partial(flip, low=0.95),
    "file cut off": cut,
    "file empty": lambda path, rng: os.truncate(path, 0),
    "file of text": lambda path, rng: path.write_text("not a checkpoint"),
    "weights missing": partial(without, "state_dict"),
    "our part missing": partial(without, "aem_lightning"),
    "file that runs code": lambda path, rng: torch.save({"state_dict": Run()}, path),
}
VALUES = {
    "optimizer.lr": ["optimizer.lr=-1"],
    "optimizer": ["optimizer=null"],
    "trainer.devices": ["trainer.devices=false"],
    "scheduler": ["scheduler.total_iters='a'"],
    "advantage": ["advantage.normalize_std=abc"],
    "iterations": ["iterations=2.5"],
    "iterations_per_epoch": ["datamodule.iterations_per_epoch=0"],
    "seed": ["seed=1.5"],
    "policy.chat_template": ["policy.chat_template={}"],
    "loss": ["loss.clip_low=nan"],
    "temperature": ["temperature=inf"],
    "optimizer.betas": ["+optimizer.betas=[2,3]"],
}
SOAK = ("+callbacks.soak._target_=faults.kinds.Soak", "+datamodule.timeout_s=2")
BREAKS = (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP, signal.SIGSEGV)
SERVERS: dict[str, Callable[[Any], Any]] = {
    "error 500": lambda body: fake_endpoint.error(500, "overloaded"),
    "error 429": lambda body: fake_endpoint.error(429, "slow down"),
    "no JSON": lambda body: fake_endpoint.Answer("<html>"),
    "no choices": lambda body: fake_endpoint.Answer('{"choices": []}'),
    "empty reply": lambda body: fake_endpoint.Answer(fake_endpoint.completion("")),
    "reply is null": lambda body: fake_endpoint.Answer(fake_endpoint.completion(None)),
    "silence": lambda body: fake_endpoint.Answer(fake_endpoint.completion("x"), delay_s=4),
    "half a surrogate": lambda body: fake_endpoint.Answer(fake_endpoint.completion("\ud800")),
}
NUMBERS = {
    "weight is NaN": ("+callbacks.fault.value=nan", "+callbacks.fault.place=weight"),
    "weight is infinite": ("+callbacks.fault.value=inf", "+callbacks.fault.place=weight"),
    "moment is NaN": ("+callbacks.fault.value=nan", "+callbacks.fault.place=moment"),
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_random(*numbers: int) -> Callable[[random.Random], list[tuple[float, int]]]:
    """Signals, the first at a random moment of a run, others half a second later."""

    def moments(rng: random.Random) -> list[tuple[float, int]]:
        first = rng.uniform(0.1, 5.0)
        return [(first + i / 2, number) for i, number in enumerate(numbers)]

    return moments


def kinds() -> Iterator[Kind]:
    """Every kind of fault."""
    for name in ONCE:
        yield Kind("environment", name, partial(environment, name), ("bit-equal",))
    for name in ALWAYS:
        masked = ("went on", "named error")
        yield Kind("environment", name, partial(environment, name), masked)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL):
        run = partial(interrupted, signals=at_random(number))
        yield Kind("signal", f"{number.name} at a random moment", run, ("bit-equal",))
    twice = partial(interrupted, signals=at_random(signal.SIGTERM, signal.SIGTERM))
    yield Kind("signal", "SIGTERM twice", twice, ("bit-equal",))
    for name, does in (("disk is full", full), ("killed", die)):
        for call, number in (("fsync", 5), ("fsync", 20), ("replace", 2), ("replace", 5)):
            run = partial(
                interrupted, signals=at_random(), prepare=partial(nth, call, number, does)
            )
            yield Kind("writing", f"{name} at {call} {number}", run, ("bit-equal",))
    for name, damage in DAMAGES.items():
        yield Kind("checkpoint", name, partial(damaged, damage), ("named error",))
    for key, words in VALUES.items():
        yield Kind("config", " ".join(words), partial(typed, key, words), ("named error",))
    for name, words in NUMBERS.items():
        poison = ["+callbacks.fault._target_=faults.kinds.Poison", *words]
        yield Kind("numbers", name, partial(typed, "", poison), ("named error",))
    for name, think in SERVERS.items():
        yield Kind("server", name, partial(server, think), ("went on", "named error"))
