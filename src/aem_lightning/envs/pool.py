"""A pool of environments: a few worker processes with many env slots each, which it outlives.

Episodes are known by a key. All keys of one affinity (a group) live on one worker, where the copies
of a game share what its engine has worked out. Every call sends one message to each worker that is
concerned. `EnvPool.send` and `EnvPool.receive` are the two halves of such a call: the environments
play while the caller does something else.

A worker that dies or hangs is killed and replaced, and its live episodes are played again from
their reset and their actions: environments are deterministic, so nothing changes for the caller. An
episode that breaks its worker once more while it is replayed ends as truncated, with
``infra_error`` in its ``info``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from aem_lightning.envs.base import EnvPoolError, TextEnv
from aem_lightning.envs.episode import PooledEpisode
from aem_lightning.envs.orders import Broken, Outcome
from aem_lightning.envs.process import WorkerLostError, WorkerProcess, reraise
from aem_lightning.types import EnvStep, ResetRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Sent:
    """Orders on their way.

    Attributes:
        actions: The action of every key that was sent (None: its reset).
        keys: The keys of each worker, in the order of its orders.
        lost: The workers that were found dead.
    """

    actions: dict[str, str | None]
    keys: dict[int, list[str]]
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

    Attributes:
        restarts: Workers replaced so far.

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
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers={workers}; a pool needs at least 1")
        if slots_per_worker is not None and slots_per_worker < 1:
            raise ValueError(f"slots_per_worker={slots_per_worker}; allowed: None, or at least 1")
        if timeout_s <= 0:
            raise ValueError(f"timeout_s={timeout_s}; it must be positive")
        self.make_env = make_env
        self.workers = workers
        self.slots_per_worker = slots_per_worker
        self.timeout_s = timeout_s
        self.keep_groups = keep_groups
        self.restarts = 0
        self._processes: list[WorkerProcess] = []
        self._episodes: dict[str, PooledEpisode] = {}
        self._sent: _Sent | None = None
        self._counted: list[str] = []
        self._finalizer = weakref.finalize(self, _end, self._processes, os.getpid())

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
        for key, worker in list(self._placed(requests)):
            taken = {e.slot for e in self._episodes.values() if e.worker == worker}
            slot = next(i for i in range(len(taken) + 1) if i not in taken)
            self._episodes[key] = PooledEpisode(key, requests[key], worker, slot)
        self._sent = self._dispatch({**dict.fromkeys(requests), **actions})

    def receive(self) -> dict[str, EnvStep]:
        """Wait for the answers to the last `send`; empty without one.

        Raises:
            Exception: What making the environment raised.
        """
        sent, self._sent = self._sent, None
        return self._settle(sent) if sent else {}

    def release(self, keys: Iterable[str]) -> None:
        """Forget the episodes of ``keys``; their slots are free. Unknown keys are passed over.

        Raises:
            EnvPoolError: The answer of a key is still out; its slot is in use.
        """
        keys = list(keys)
        out = set(self._sent.actions if self._sent else ()).intersection(keys)
        if out:
            raise EnvPoolError(f"release: {sorted(out)} are still playing; call receive() first")
        for key in keys:
            self._episodes.pop(key, None)

    def counters(self) -> dict[str, int]:
        """What the environments have counted since they were last asked, summed over workers.

        A worker that has died counts nothing; the next `receive` replaces it.

        Raises:
            EnvPoolError: Answers are still out.
        """
        if self._sent is not None:
            raise EnvPoolError("counters: answers are still out; call receive() first")
        total = dict.fromkeys(self._counted, 0)
        for process in self._processes:
            with contextlib.suppress(WorkerLostError):
                for name, count in process.counters(self.timeout_s).items():
                    total[name] = total.get(name, 0) + count
        self._counted = sorted(total)
        return total

    def close(self) -> None:
        """End the workers. A later `reset` starts new ones."""
        self._episodes.clear()
        self._sent = None
        _end(self._processes, os.getpid())

    def worker_pids(self) -> tuple[int, ...]:
        """Process ids of the running workers."""
        return tuple(process.pid for process in self._processes)

    def worker_of(self, key: str) -> int:
        """Index of the worker that plays ``key``."""
        return self._episodes[key].worker

    def __enter__(self) -> EnvPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        names = ("make_env", "workers", "slots_per_worker", "timeout_s", "keep_groups")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _start(self) -> None:
        """Start the workers, all at once, where they do not run yet."""
        if self._processes:
            for process in self._processes:
                process.trim_stderr()
            return
        try:
            factory = pickle.dumps(self.make_env)
        except Exception as error:
            raise EnvPoolError(
                f"make_env={self.make_env!r} cannot be pickled ({error}); give a class or function "
                "of an importable module, or a functools.partial of one"
            ) from error
        self._processes.extend(WorkerProcess(factory) for _ in range(self.workers))
        try:
            for process in self._processes:
                process.wait_ready(self.timeout_s)
        except BaseException:
            self.close()
            raise

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

    def _dispatch(self, actions: dict[str, str | None]) -> _Sent:
        """Send every worker its orders; an episode that is over gets none."""
        sent = _Sent(actions, {}, {})
        for key in actions:
            if not self._episodes[key].is_over:
                sent.keys.setdefault(self._episodes[key].worker, []).append(key)
        for worker, keys in sent.keys.items():
            try:
                orders = [self._episodes[key].next_order(actions[key]) for key in keys]
                self._processes[worker].send(orders)
            except WorkerLostError as error:
                sent.lost[worker] = error
        return sent

    def _settle(self, sent: _Sent) -> dict[str, EnvStep]:
        """The answer of every key that was sent, after repairs where they are needed."""
        due = {key: sent.actions[key] for keys in sent.keys.values() for key in keys}
        outcomes = self._collect(sent)
        raised = {}
        for key, outcome in outcomes.items():
            action = due.pop(key)
            if isinstance(outcome, Broken):
                raised[key] = action, outcome
            else:
                self._episodes[key].record(action, outcome[-1])
        for worker, reason in sent.lost.items():
            self._revive(worker, due, reason)
        for key, (action, broken) in raised.items():
            self._try_again(self._episodes[key], action, broken)
        return {key: self._answer(key) for key in sent.actions}

    def _answer(self, key: str) -> EnvStep:
        step = self._episodes[key].last
        assert step is not None  # every way through _settle records an answer or a failure
        return step

    def _collect(self, sent: _Sent) -> dict[str, Outcome]:
        """Wait for every worker's outcomes; workers that die meanwhile join ``sent.lost``."""
        outcomes: dict[str, Outcome] = {}
        for worker, keys in sent.keys.items():
            if worker in sent.lost:
                continue
            try:
                answer = self._processes[worker].outcomes(self.timeout_s)
                outcomes.update(zip(keys, answer, strict=True))
            except WorkerLostError as error:
                sent.lost[worker] = error
        self._raise_fatal(outcomes.values())
        return outcomes

    def _raise_fatal(self, outcomes: Iterable[Outcome]) -> None:
        """Raise here what no episode can do better, such as a missing package."""
        for outcome in outcomes:
            if isinstance(outcome, Broken) and outcome.fatal:
                self.close()
                reraise(outcome)

    def _try_again(self, episode: PooledEpisode, action: str | None, broken: Broken) -> None:
        """Replay an episode whose environment raised, in a new one; a second failure ends it."""
        if episode.is_over:  # given up while its worker was revived
            return
        logger.warning("Episode %s raised and is replayed: %s", episode.key, broken.summary)
        try:
            self._replay(episode, {episode.key: action})
        except WorkerLostError as lost:
            episode.fail(str(lost))
            self._revive(episode.worker, {}, lost)

    def _revive(self, worker: int, due: dict[str, str | None], reason: Exception) -> None:
        """Replace ``worker`` and bring its episodes up to date, with the actions that are ``due``.

        They are replayed one by one, so that an episode that breaks the new worker too is known and
        given up; the others then start over.
        """
        while True:
            logger.warning("Environment worker %d is replaced: %s", worker, reason)
            self.restarts += 1
            self._processes[worker].kill()
            self._processes[worker] = WorkerProcess(pickle.dumps(self.make_env))
            self._processes[worker].wait_ready(self.timeout_s)
            episodes = [e for e in self._episodes.values() if e.worker == worker and not e.is_over]
            for episode in sorted(episodes, key=lambda e: e.slot):
                try:
                    self._replay(episode, due)
                except WorkerLostError as lost:
                    episode.fail(f"its worker was lost twice: {lost}")
                    reason = lost
                    break
            else:
                return

    def _replay(self, episode: PooledEpisode, due: dict[str, str | None]) -> None:
        """Play ``episode`` from its start, with the action that is due for it, if any.

        Raises:
            WorkerLostError: The worker died or hung.
        """
        is_due = episode.key in due
        action = due.get(episode.key)
        process = self._processes[episode.worker]
        process.send([episode.replay_order([] if action is None else [action])])
        outcome = process.outcomes(self.timeout_s)[0]
        self._raise_fatal([outcome])
        if isinstance(outcome, Broken):
            episode.fail(outcome.summary)
        elif episode.last and outcome[len(episode.actions)].observation != episode.last.observation:
            episode.fail("its replay took another course: the environment is not deterministic")
        elif is_due:
            episode.record(action, outcome[-1])
            del due[episode.key]


def _end(processes: list[WorkerProcess], owner: int) -> None:
    """End ``processes`` and empty the list; in a fork of their owner, only forget them."""
    if os.getpid() == owner:
        for process in processes:
            process.hang_up()
        for process in processes:
            tail = process.stderr_tail()
            if tail:
                logger.debug("Worker %d wrote: %s", process.pid, tail)
            process.kill(grace_s=1.0)
    processes.clear()
