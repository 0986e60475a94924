"""A pool of environments: a few worker processes with many env slots each, which it outlives.

Episodes are known by a key. All keys of one affinity (a group) live on one worker, where the copies
of a game share what its engine has worked out. Every call sends one message to each worker that is
concerned. `EnvPool.send` and `EnvPool.receive` are the two halves of such a call: the environments
play while the caller does something else.

A worker that dies, hangs or says what is no answer is killed and replaced, and its live episodes
are played again from their reset and their actions: environments are deterministic, so nothing
changes for the caller. An episode that breaks its worker once more while it is replayed ends as
truncated, with ``infra_error`` in its ``info``, and so does one whose environment returns what the
contract does not allow. A task that breaks again and again is in quarantine: its episodes end at
once.
"""

from __future__ import annotations

import logging
import math
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from aem_lightning.envs.base import EnvPoolError, TextEnv
from aem_lightning.envs.crew import Crew, Due
from aem_lightning.envs.episode import PooledEpisode
from aem_lightning.envs.process import WorkerLostError
from aem_lightning.types import EnvStep, ResetRequest

OnBadAnswer = Literal["mask", "stop"]


@dataclass(frozen=True, slots=True)
class _Sent:
    """Orders on their way.

    Attributes:
        keys: All keys that were asked for.
        due: The action of every key whose episode got an order (None: its reset).
        shares: The episodes of each worker, in the order of its orders.
        lost: The workers that were found dead.
    """

    keys: list[str]
    due: Due
    shares: dict[int, list[PooledEpisode]]
    lost: dict[int, WorkerLostError]


class EnvPool:
    """Environments in worker processes.

    Workers start with the first `reset`; a pickled pool is its arguments. POSIX only.

    Args:
        make_env: Makes one environment. It goes to the workers pickled: a class or function of an
            importable module, or a ``functools.partial`` of one.
        workers: Processes; one a core is enough.
        slots_per_worker: Episodes that a worker hosts at most; by default as many as are asked for.
        keep_groups: Episodes of one affinity live on one worker; without it each lives on the least
            loaded one.
        timeout_s: A worker that gives no sign of life for so long, while it has work, counts as
            hung. One that starts may be idle for so long, or compute for so long, but for half a
            minute at least.
        memory_gb: What a worker may allocate, in GB; one that wants more is replaced.
        pass_environment: Names of the environment variables that workers get beside those of
            `worker_variables`, which holds back tokens and keys.
        on_bad_answer: What an answer does that the contract does not allow, such as a reward of
            NaN: ``mask`` its episode, or ``stop``.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        make_env: Callable[[], TextEnv],
        *,
        workers: int = 2,
        slots_per_worker: int | None = None,
        timeout_s: float = 60.0,
        keep_groups: bool = True,
        memory_gb: float | None = None,
        pass_environment: Sequence[str] = (),
        on_bad_answer: OnBadAnswer = "mask",
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers={workers}; a pool needs at least 1")
        if slots_per_worker is not None and slots_per_worker < 1:
            raise ValueError(f"slots_per_worker={slots_per_worker}; allowed: None, or at least 1")
        check_pool_settings(timeout_s, memory_gb, pass_environment, on_bad_answer)
        self.make_env = make_env
        self.workers = workers
        self.slots_per_worker = slots_per_worker
        self.timeout_s = timeout_s
        self.keep_groups = keep_groups
        self.memory_gb = memory_gb
        self.pass_environment = tuple(pass_environment)
        self.on_bad_answer = on_bad_answer
        self._crew = Crew(
            make_env, timeout_s, memory_gb, self.pass_environment, stop=on_bad_answer == "stop"
        )
        self._episodes: dict[str, PooledEpisode] = {}
        self._sent: _Sent | None = None
        self._counted: list[str] = []
        self._finalizer = weakref.finalize(self, _end, self._crew, os.getpid())

    @property
    def restarts(self) -> int:
        """Workers replaced so far."""
        return self._crew.restarts

    @property
    def quarantine(self) -> Mapping[str, str]:
        """The tasks that are not played any more, and what broke them last."""
        return self._crew.quarantine

    def mend_quietly(self) -> None:
        """Log what goes wrong in workers, and is mended, for debugging alone."""
        self._crew.log_level = logging.DEBUG

    def reset(self, requests: Mapping[str, ResetRequest]) -> dict[str, EnvStep]:
        """Start an episode for every key; a key that is in play starts anew.

        Raises:
            EnvPoolError: More episodes than slots, or workers that cannot be started.
            Exception: What making the environment raised.
        """
        self.send(requests)
        return self.receive()

    def step(self, actions: Mapping[str, str]) -> dict[str, EnvStep]:
        """Send every key's action to its episode.

        Raises:
            EnvPoolError: A key without an episode, or whose episode is over.
        """
        self.send(actions=actions)
        return self.receive()

    def send(
        self,
        requests: Mapping[str, ResetRequest] | None = None,
        actions: Mapping[str, str] | None = None,
    ) -> None:
        """Set resets and actions going without waiting for their answers; `receive` brings them.

        Without any, nothing is sent.

        Raises:
            EnvPoolError: As `reset` and `step` do, and when the last answers were not received.
        """
        requests, actions = requests or {}, actions or {}
        if self._sent is not None:
            raise EnvPoolError("send: the last answers are still out; call receive() first")
        if not requests and not actions:
            return
        if requests:
            self._start()
        self._check_playing(actions)
        self.release(requests)
        live = {e.request.task_id for e in self._episodes.values() if not e.is_over}
        self._crew.quarantine.start({r.task_id for r in requests.values()} - live)
        for key, worker in list(self._placed(requests)):
            taken = {e.slot for e in self._episodes.values() if e.worker == worker}
            slot = next(i for i in range(len(taken) + 1) if i not in taken)
            self._episodes[key] = episode = PooledEpisode(key, requests[key], worker, slot)
            if reason := self.quarantine.get(episode.request.task_id):
                episode.end(f"its task is in quarantine: {reason}")
        self._sent = self._dispatch({**dict.fromkeys(requests), **actions})

    def receive(self) -> dict[str, EnvStep]:
        """Wait for the answers to the last `send`; empty without one.

        Raises:
            Exception: What making the environment raised.
        """
        sent, self._sent = self._sent, None
        if sent is None:
            return {}
        self._crew.settle(sent.shares, sent.due, sent.lost, list(self._episodes.values()))
        return {key: self._answer(key) for key in sent.keys}

    def _answer(self, key: str) -> EnvStep:
        step = self._episodes[key].last
        assert step is not None  # whatever happens, settling records an answer or a failure
        return step

    def release(self, keys: Iterable[str]) -> None:
        """Forget the episodes of ``keys``; their slots are free. Unknown keys are passed over.

        Raises:
            EnvPoolError: The answer of a key is still out; its slot is in use.
        """
        keys = list(keys)
        out = set(self._sent.keys if self._sent else ()).intersection(keys)
        if out:
            raise EnvPoolError(f"release: {sorted(out)} are still playing; call receive() first")
        for key in keys:
            self._episodes.pop(key, None)

    def counters(self) -> dict[str, float]:
        """What the environments have counted since they were last asked, summed over workers.

        A worker that has died counts nothing; the next `receive` replaces it.

        Raises:
            EnvPoolError: Answers are still out.
        """
        if self._sent is not None:
            raise EnvPoolError("counters: answers are still out; call receive() first")
        total = dict.fromkeys(self._counted, 0.0) | self._crew.counters()
        self._counted = sorted(total)
        return total

    def close(self) -> None:
        """End the workers. A later `reset` starts new ones."""
        self._episodes.clear()
        self._sent = None
        _end(self._crew, os.getpid())

    def worker_pids(self) -> tuple[int, ...]:
        """Process ids of the running workers."""
        return tuple(process.pid for process in self._crew.processes)

    def worker_of(self, key: str) -> int:
        """Index of the worker that plays ``key``."""
        return self._episodes[key].worker

    def __enter__(self) -> EnvPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("make_env", *_ARGUMENTS)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _start(self) -> None:
        """Start the workers, where they do not run yet."""
        for process in self._crew.processes:
            process.trim_stderr()
        if not self._crew.processes:
            self._crew.start(self.workers)

    def _placed(self, requests: Mapping[str, ResetRequest]) -> Iterator[tuple[str, int]]:
        """A worker for every key: its affinity's, else the least loaded one."""
        load = Counter(episode.worker for episode in self._episodes.values())
        home: dict[int | str, int] = {}
        groups: dict[int | str, list[str]] = {}
        if self.keep_groups:
            home |= {e.request.affinity: e.worker for e in self._episodes.values()}
        for key, request in requests.items():
            groups.setdefault(request.affinity if self.keep_groups else key, []).append(key)
        for affinity, keys in groups.items():
            worker = home.get(affinity, min(range(self.workers), key=lambda w: (load[w], w)))
            load[worker] += len(keys)
            if self.slots_per_worker is not None and load[worker] > self.slots_per_worker:
                raise EnvPoolError(
                    f"{load[worker]} episodes for one of {self.workers} workers (a group stays on "
                    f"one), slots_per_worker={self.slots_per_worker}; release finished keys, or "
                    "raise slots_per_worker or workers"
                )
            yield from ((key, worker) for key in keys)

    def _check_playing(self, keys: Iterable[str]) -> None:
        for key in keys:
            if key not in self._episodes:
                raise EnvPoolError(f"step: no episode has the key {key!r}; reset it first")
            episode = self._episodes[key]
            if episode.is_over and not (episode.last and episode.last.infra_error):
                raise EnvPoolError(f"step: episode {key!r} is over; reset or release it")

    def _dispatch(self, actions: Due) -> _Sent:
        """Send every worker its orders; an episode that is over gets none."""
        due: Due = {}
        shares: dict[int, list[PooledEpisode]] = {}
        for key, action in actions.items():
            episode = self._episodes[key]
            if not episode.is_over:
                due[key] = action
                shares.setdefault(episode.worker, []).append(episode)
        return _Sent(list(actions), due, shares, self._crew.send(shares, due))


_ARGUMENTS = (
    "workers",
    "slots_per_worker",
    "timeout_s",
    "keep_groups",
    "memory_gb",
    "pass_environment",
    "on_bad_answer",
)


def check_pool_settings(
    timeout_s: float, memory_gb: float | None, pass_environment: Sequence[str], on_bad_answer: str
) -> None:
    """Raise unless `EnvPool` takes these; in the words of a DataModule's config.

    Raises:
        ValueError: Every value that is out of range.
    """
    names = pass_environment
    is_list = not isinstance(names, str) and all(isinstance(name, str) for name in names)
    checks = (
        ("timeout_s", timeout_s, _is_above_0(timeout_s), "seconds, more than 0, e.g. 120"),
        (
            "memory_gb",
            memory_gb,
            memory_gb is None or _is_above_0(memory_gb),
            "null, or GB, e.g. 4",
        ),
        ("pass_environment", names, is_list, "a list of names, e.g. [MY_TOKEN]"),
        ("on_bad_answer", on_bad_answer, on_bad_answer in get_args(OnBadAnswer), "mask, or stop"),
    )
    if problems := [
        f"datamodule.{name}={v!r}: type {w}" for name, v, fits, w in checks if not fits
    ]:
        raise ValueError("; ".join(problems))


def _is_above_0(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf  # type: ignore[operator]


def _end(crew: Crew, owner: int) -> None:
    """End the workers of ``crew``; in a fork of their owner, only forget them."""
    if os.getpid() == owner:
        crew.close()
    crew.processes.clear()
