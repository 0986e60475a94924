"""The journal of a rollout: its answers and its environments' steps, on disk while it is played.

A rollout that was interrupted is played again by the same collector, from its journal. In the place
of the environments stand their recorded steps; where the record ends, the episodes that are still
open are brought up to date by their actions, and no others. In the place of the policy stand its
recorded answers, as far as the engine can go on behind them to the very bit: which responses share
a batch, and in which batch a cached key was computed, decides the last bits of log-probabilities.
So an engine that has a ``state_dict`` has it saved now and then, between two batches, and goes on
from there; what came later is sampled again, and comes out the same. An engine without one never
gives the same bits twice: there every recorded answer counts.

A line of the file is a checksum and a record in JSON: the key of the rollout, then every pass of
the collector. It reaches the system before the next pass begins, so a kill costs the pass under
way; half a line at the end is cut off. A rollout of other weights or settings has another key.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import pickle
import shutil
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from aem_lightning.rollout.collector import Collector, EnvironmentPool, Live, Responder
from aem_lightning.rollout.engine import Result
from aem_lightning.types import EnvStep, ResetRequest

log = logging.getLogger(__name__)

# What saved states may take: of the time of a rollout, of the disk that is free, and bytes at most.
TIME_SHARE, DISK_SHARE, MOST_BYTES = 0.005, 0.1, 4 << 30
# What torch raises for half a file, for another kind of file, and what ours lack of a stranger's.
UNREADABLE = (pickle.UnpicklingError, OSError, RuntimeError, EOFError, LookupError, TypeError)


def recorded(collector: Collector, engine: Any, path: Path, key: str) -> Collector:
    """``collector``, which plays one rollout with ``engine`` and keeps its journal at ``path``.

    Where ``path`` has the beginning of the rollout ``key``, or all of it, that is not played again.
    A journal that another process writes to is left alone, and none is kept.
    """
    try:
        tape = Tape(path, key)
    except OSError as error:
        log.warning("no journal of this rollout is kept: %s", error)
        return collector
    player = RecordedResponder(collector.responder, engine, tape)
    return replace(collector, pool=RecordedPool(collector.pool, tape), responder=player)


class Tape:
    """The file of one journal: the passes that it has, then those to come.

    Args:
        path: The file; what it holds of another rollout is dropped.
        key: What the rollout depends on.

    Attributes:
        at: Passes played so far.
        results: The answers of the pass under way.

    Raises:
        OSError: The file cannot be written, or another process has it.
    """

    def __init__(self, path: Path, key: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.at, self.results = 0, list[Any]()
        self._path, self._key = path, key
        self._file = path.open("a+b")
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._file.seek(0)
        records, self._ends = read_records(self._file.read())
        if not records or records[0] != key:
            records, self._ends = [], []
        self._file.truncate(self._ends[-1] if records else 0)
        if not records:
            self._write(key)
        self.is_whole = records[-1:] == ["over"]
        self.passes: list[dict[str, Any]] = records[1 : -1 if self.is_whole else None]

    @property
    def recorded(self) -> dict[str, Any] | None:
        """The pass under way, where the journal has it."""
        return self.passes[self.at] if self.at < len(self.passes) else None

    def advance(self, steps: Mapping[str, EnvStep]) -> None:
        """End the pass under way; one that was not recorded is written down."""
        if self.recorded is None:
            rows = {key: _row(step) for key, step in steps.items()}
            self._write({"results": self.results, "steps": rows})
        self.at, self.results = self.at + 1, []

    def end(self) -> None:
        """The rollout is over."""
        if not self.is_whole:
            self._write("over")
        self._state_path.unlink(missing_ok=True)
        self._file.close()

    def cut(self) -> None:
        """Drop what is recorded from the pass under way on: the rollout takes another course."""
        log.warning("the rollout parts from its journal in pass %d and goes on without", self.at)
        del self.passes[self.at :]
        self.is_whole = False
        self._file.truncate(self._ends[self.at])

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Keep the state of an engine between two passes."""
        import torch  # here: whoever has a state has torch

        partial = self._state_path.with_suffix(".part")
        try:
            torch.save({**state, "at": self.at, "rollout": self._key}, partial)
            os.replace(partial, self._state_path)
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)
            log.warning("the engine's state is not saved: %s", error)

    def load_state(self) -> dict[str, Any] | None:
        """The state kept last, where it belongs to what is recorded."""
        import torch

        try:
            state: dict[str, Any] = torch.load(self._state_path, "cpu", weights_only=True)
            fits = state["rollout"] == self._key and state["at"] <= len(self.passes)
        except UNREADABLE:
            return None
        return state if fits else None

    @property
    def room(self) -> int:
        """Bytes that a state may have."""
        return min(MOST_BYTES, int(DISK_SHARE * shutil.disk_usage(self._path.parent).free))

    @property
    def _state_path(self) -> Path:
        return self._path.with_suffix(".state")

    def _write(self, record: Any) -> None:
        if self._file.closed:
            return
        try:
            text = json.dumps(record, separators=(",", ":")).encode()
            self._file.write(b"%08x %s\n" % (zlib.crc32(text), text))
            self._file.flush()
        except (OSError, TypeError, ValueError) as error:  # no room, or an info that is not plain
            log.warning("the journal of this rollout ends here: %s", error)
            self._file.close()


def read_records(data: bytes) -> tuple[list[Any], list[int]]:
    """The records of a journal up to the first damaged line, and where each of them ends."""
    records, ends = [], []
    end = 0
    for line in data.splitlines(keepends=True):
        checksum, _, text = line.rstrip(b"\n").partition(b" ")
        if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
            break
        end += len(line)
        records.append(json.loads(text))
        ends.append(end)
    return records, ends


@dataclass(slots=True)
class RecordedPool:
    """Environments, as far as the journal reaches: its steps; then the environments themselves."""

    pool: EnvironmentPool
    tape: Tape
    _starts: dict[str, ResetRequest] = field(default_factory=dict)
    _actions: dict[str, list[str]] = field(default_factory=dict)
    _seen: dict[str, EnvStep] = field(default_factory=dict)
    _lost: dict[str, EnvStep] = field(default_factory=dict)
    _sent: list[str] = field(default_factory=list)
    _is_live: bool = False

    def send(
        self,
        requests: Mapping[str, ResetRequest] | None = None,
        actions: Mapping[str, str] | None = None,
    ) -> None:
        """Hand on, once the environments play themselves."""
        requests, actions = requests or {}, actions or {}
        self._starts.update(requests)
        self._actions.update({key: [] for key in requests})
        for key, action in actions.items():
            self._actions[key].append(action)
        self._sent = [*requests, *actions]
        if not self._starts:
            self.tape.end()
        elif self._is_live:
            self._send(self._sent)
        elif self.tape.recorded is None:
            self._catch_up()

    def receive(self) -> Mapping[str, EnvStep]:
        """The steps of the pass under way."""
        record = self.tape.recorded
        if record is not None and record["steps"].keys() != set(self._sent):
            self.tape.cut()
            record = None
        if record is not None:
            steps = {key: EnvStep(*row) for key, row in record["steps"].items()}
        else:
            if not self._is_live:
                self._catch_up()
            lost = {key: self._lost[key] for key in self._sent if key in self._lost}
            steps = {**self.pool.receive(), **lost}
        self._sent = []
        self._seen.update(steps)
        self.tape.advance(steps)
        return steps

    def release(self, keys: Iterable[str]) -> None:
        """Forget the episodes of ``keys``."""
        keys = list(keys)
        for key in keys:
            del self._starts[key], self._actions[key], self._seen[key]
        if self._is_live:
            self.pool.release(keys)

    def _catch_up(self) -> None:
        """Bring the open episodes to where the journal ends, and set going what was sent there."""
        self._is_live = True
        done = {key: len(said) - (key in self._sent) for key, said in self._actions.items()}
        behind = [key for key, count in done.items() if count >= 0]
        self.pool.send({key: self._starts[key] for key in behind})
        now = dict(self.pool.receive())
        for turn in range(max(done.values(), default=0)):
            playing = [key for key in behind if key not in self._lost and turn < done[key]]
            self.pool.send(actions={key: self._actions[key][turn] for key in playing})
            now.update(self.pool.receive())
            self._find_lost(key for key in playing if now[key].terminated or now[key].truncated)
        self._find_lost(
            key for key in behind if now[key].observation != self._seen[key].observation
        )
        self._send(self._sent)

    def _find_lost(self, keys: Iterable[str]) -> None:
        why = "its replay took another course: the environment is not deterministic"
        for key in keys:
            said = self._seen[key].observation
            self._lost[key] = EnvStep(said, truncated=True, info={"infra_error": why})

    def _send(self, keys: Iterable[str]) -> None:
        mine = [key for key in keys if key not in self._lost]
        self.pool.send(
            {key: self._starts[key] for key in mine if not self._actions[key]},
            {key: self._actions[key][-1] for key in mine if self._actions[key]},
        )


@dataclass(slots=True)
class RecordedResponder:
    """A policy, as far as the journal is to be believed: its answers; then the policy itself."""

    responder: Responder
    engine: Any
    tape: Tape
    _believed: int = 0
    _state: dict[str, Any] | None = None
    _waiting: dict[str, Live] = field(default_factory=dict)
    _saved: float = 0.0
    _cost: float = 0.02

    def __post_init__(self) -> None:
        if self.tape.is_whole or not hasattr(self.engine, "state_dict"):
            self._believed = len(self.tape.passes)
        else:
            self._state = self.tape.load_state()
            self._believed = 0 if self._state is None else self._state["at"]
        self._saved = time.monotonic()
        if self.tape.passes:
            log.info(
                "of this rollout %d passes are in the journal; %d of them are not sampled again",
                len(self.tape.passes),
                self._believed,
            )

    def ask(self, live: Mapping[str, Live]) -> None:
        """Hand on what no recorded answer is for."""
        if self.tape.at < self._believed:
            self._waiting.update(live)
            return
        if self._state is not None:
            self.engine.load_state_dict(self._state)
            self._state = None
        else:
            self._save_state()
        self.responder.ask({**self._waiting, **live})
        self._waiting = {}

    def answers(self) -> Sequence[Result]:
        """Recorded answers, then those of the policy."""
        record = self.tape.recorded
        if record is not None and self.tape.at < self._believed:
            results = [
                Result(key, tokens, logprobs, entropies, reason, version=0, reused=0)
                for key, tokens, logprobs, entropies, reason in record["results"]
            ]
            for result in results:
                del self._waiting[result.key]
            return results
        results = sorted(self.responder.answers(), key=lambda result: result.key)
        self.tape.results = [
            [r.key, r.tokens, r.logprobs, r.entropies, r.finish_reason] for r in results
        ]
        if record is not None and record["results"] != self.tape.results:
            self.tape.cut()
        return results

    def forget(self, keys: Iterable[str]) -> None:
        """Hand on."""
        self.responder.forget(keys)

    def _save_state(self) -> None:
        """Save the engine's state, where the share of the time that this may take has passed."""
        start = time.monotonic()
        if not hasattr(self.engine, "state_dict") or start - self._saved < self._cost / TIME_SHARE:
            return
        if (state := self.engine.state_dict(self.tape.room)) is not None:
            self.tape.save_state(state)
            self._saved = time.monotonic()
            self._cost = self._saved - start


def _row(step: EnvStep) -> list[Any]:
    return [step.observation, step.reward, step.terminated, step.truncated, dict(step.info)]
