"""The workers of a pool: how they are started, heard, and replaced when they are lost.

Nothing is waited for one after the other: all workers have their time at once, and so have the
episodes that a worker which hung still owes, each of which is tried in a process of its own.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TypeVar

from aem_lightning.envs.base import EnvContractError, EnvPoolError, TextEnv
from aem_lightning.envs.episode import PooledEpisode
from aem_lightning.envs.errors import reraise
from aem_lightning.envs.orders import CLOSE_S, Broken, Census, Counted, Outcome, Played, Refused
from aem_lightning.envs.process import WorkerHungError, WorkerLostError, WorkerProcess, listen
from aem_lightning.envs.quarantine import Quarantine
from aem_lightning.envs.variables import worker_variables

logger = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)
Due = dict[str, str | None]
"""The action of every episode whose answer is still missing; None: its reset."""

GRACE_S = 1.0  # for all workers that are at an order, which nobody waits for
PROBES = 16  # processes at most in which the episodes of workers that hung are tried, at once


class Crew:
    """The worker processes, and what becomes of episodes when these break.

    Args:
        make_env: Makes one environment.
        timeout_s: As for `EnvPool`, like the others.
        memory_gb: What a worker may allocate.
        pass_environment: Environment variables that workers get beside the usual ones.
        stop: A bad answer ends everything.

    Attributes:
        processes: The workers; empty before the start.
        restarts: Workers replaced so far.
        quarantine: The tasks that are not played any more, and why.
        log_level: Of what goes wrong in workers and is mended.
    """

    def __init__(
        self,
        make_env: Callable[[], TextEnv],
        timeout_s: float,
        memory_gb: float | None,
        pass_environment: Sequence[str],
        *,
        stop: bool,
    ) -> None:
        self._make_env, self._timeout_s, self._stop = make_env, timeout_s, stop
        self._memory_gb, self._pass_environment = memory_gb, pass_environment
        self.processes: list[WorkerProcess] = []
        self.restarts = 0
        self.quarantine = Quarantine()
        self.log_level = logging.WARNING

    def start(self, workers: int) -> None:
        """Start the workers, all at once.

        Raises:
            EnvPoolError: They cannot be started.
            Exception: What making the environment raised.
        """
        try:
            pickle.dumps(self._make_env)
        except Exception as error:
            raise EnvPoolError(
                f"make_env={self._make_env!r} cannot be pickled ({error}); give a class or "
                "function of an importable module, or a functools.partial of one"
            ) from error
        self.processes.extend(self._new_process() for _ in range(workers))
        try:
            for process in self.processes:
                process.wait_ready(self._timeout_s)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the workers."""
        _end(self.processes)
        self.processes.clear()

    def counters(self) -> Counter[str]:
        """What the environments have counted since they were last asked, summed over workers."""
        total: Counter[str] = Counter()
        for process in self.processes:
            with contextlib.suppress(WorkerLostError):
                process.send(Census(), self._timeout_s)
        for worker, answer in listen(dict(enumerate(self.processes)), self._timeout_s):
            if isinstance(answer, Counted):
                total.update(answer.counts)
            elif isinstance(answer, WorkerLostError):
                self.processes[worker].kill()  # an answer that comes late would answer nothing
        return total

    def send(
        self, shares: Mapping[int, Sequence[PooledEpisode]], due: Due
    ) -> dict[int, WorkerLostError]:
        """Send every worker the orders that continue its share; the workers found lost."""
        lost = {}
        for worker, episodes in shares.items():
            orders = [episode.next_order(due[episode.key]) for episode in episodes]
            try:
                self.processes[worker].send(orders, self._timeout_s)
            except WorkerLostError as error:
                lost[worker] = error
        return lost

    def settle(
        self,
        shares: Mapping[int, Sequence[PooledEpisode]],
        due: Due,
        lost: dict[int, WorkerLostError],
        episodes: Sequence[PooledEpisode],
    ) -> None:
        """Wait for what was sent, and repair what broke: every episode has its answer then.

        Args:
            shares: The episodes that were sent, of each worker, in the order of its orders.
            due: Their actions.
            lost: The workers that were found lost when sending.
            episodes: All that are in play.
        """
        for episode, outcome in self._heard(dict(enumerate(self.processes)), shares, lost):
            if isinstance(outcome, Played):
                episode.record(due.pop(episode.key), outcome.steps[-1])
            elif isinstance(outcome, Refused):
                self._give_up(episode, outcome, due)
            else:
                text = "Episode %s raised and is replayed: %s"
                logger.log(self.log_level, text, episode.key, outcome.summary)
        if due or lost:
            self._repair(lost, due, episodes)

    def _new_process(self) -> WorkerProcess:
        variables = worker_variables(self._pass_environment)
        return WorkerProcess(pickle.dumps(self._make_env), variables, self._memory_gb)

    def _heard(
        self,
        processes: Mapping[K, WorkerProcess],
        shares: Mapping[K, Sequence[PooledEpisode]],
        lost: dict[K, WorkerLostError],
    ) -> Iterator[tuple[PooledEpisode, Outcome]]:
        """The outcomes of the orders of ``shares`` as they come; who is lost joins ``lost``.

        Raises:
            Exception: What no episode can do better, such as a missing package.
        """
        out = {place: iter(episodes) for place, episodes in shares.items() if place not in lost}
        for place, answer in listen({place: processes[place] for place in out}, self._timeout_s):
            if isinstance(answer, WorkerLostError):
                lost[place] = answer
            elif isinstance(answer, Played | Refused | Broken):
                if isinstance(answer, Broken) and answer.fatal:
                    self.close()
                    reraise(answer)
                yield next(out[place]), answer

    def _repair(
        self, lost: dict[int, WorkerLostError], due: Due, episodes: Sequence[PooledEpisode]
    ) -> None:
        """Replace the workers that were lost, and bring episodes up to date.

        Those of workers that were lost are replayed, and those that raised, with the action that is
        due, if one is. One that breaks once more is given up; the others then start over.
        """
        hung = {worker for worker, why in lost.items() if isinstance(why, WorkerHungError)}
        for worker in hung:
            self.processes[worker].kill()
        while owed := [e for e in episodes if e.key in due and e.worker in hung]:
            self._probe(owed, due)
        while lost or due:
            self._replace(lost)
            # What has answered before comes first: it is not lost with what follows.
            shares: dict[int, list[PooledEpisode]] = {}
            for episode in sorted(episodes, key=lambda episode: episode.key in due):
                if not episode.is_over and (episode.worker in lost or episode.key in due):
                    shares.setdefault(episode.worker, []).append(episode)
            lost = self._replay(dict(enumerate(self.processes)), shares, due)

    def _replace(self, lost: Mapping[int, WorkerLostError]) -> None:
        for worker, reason in lost.items():
            text = "Environment worker %d is replaced: %s"
            logger.log(self.log_level, text, worker, reason)
            self.restarts += 1
            self.processes[worker].kill()
            self.processes[worker] = self._new_process()
        for worker in lost:
            self.processes[worker].wait_ready(self._timeout_s)

    def _probe(self, episodes: Sequence[PooledEpisode], due: Due) -> None:
        """Try episodes whose worker hung in processes of their own, so that all hang at once.

        Those that do are given up. Where a process is lost, what is left of its share stays due.
        """
        number = min(PROBES, len(episodes))
        probes: dict[int, WorkerProcess] = {}
        try:
            for place in range(number):
                probes[place] = self._new_process()
            for probe in probes.values():
                probe.wait_ready(self._timeout_s)
            shares = {place: episodes[place::number] for place in probes}
            for place in self._replay(probes, shares, due):
                probes[place].kill()
        finally:
            _end([*probes.values()])

    def _replay(
        self,
        processes: Mapping[int, WorkerProcess],
        shares: Mapping[int, Sequence[PooledEpisode]],
        due: Due,
    ) -> dict[int, WorkerLostError]:
        """Play episodes from their start, with the actions that are due; the processes lost."""
        lost: dict[int, WorkerLostError] = {}
        left = {place: list(episodes) for place, episodes in shares.items()}
        for place, episodes in shares.items():
            try:
                processes[place].send(
                    [e.replay_order(due.get(e.key)) for e in episodes], self._timeout_s
                )
            except WorkerLostError as error:
                lost[place] = error
        places = {episode.key: place for place, episodes in shares.items() for episode in episodes}
        for episode, outcome in self._heard(processes, shares, lost):
            left[places[episode.key]].remove(episode)
            self._take_again(episode, outcome, due)
        for place, reason in lost.items():
            self._give_up(left[place][0], f"its worker was lost twice: {reason}", due)
        return lost

    def _take_again(self, episode: PooledEpisode, outcome: Outcome, due: Due) -> None:
        """Take in how an episode went that was played once more."""
        if isinstance(outcome, Refused):
            self._give_up(episode, outcome, due)
        elif isinstance(outcome, Broken):
            self._give_up(episode, outcome.summary, due)
        else:
            before = outcome.steps[-1 if due.get(episode.key) is None else 0]
            if episode.last and before.observation != episode.last.observation:
                due.pop(episode.key, None)
                reason = "its replay took another course: the environment is not deterministic"
                episode.fail(reason, self.log_level)
            elif episode.key in due:
                episode.record(due.pop(episode.key), outcome.steps[-1])

    def _give_up(self, episode: PooledEpisode, why: str | Refused, due: Due) -> None:
        """End an episode that broke beyond repair, and remember its task."""
        reason = why if isinstance(why, str) else why.reason
        if self._stop and isinstance(why, Refused):
            self.close()
            raise EnvContractError(
                f"{reason}. To leave such episodes out, type datamodule.on_bad_answer=mask"
            )
        due.pop(episode.key, None)
        episode.fail(reason, self.log_level)
        self.quarantine.blame(episode.request.task_id, reason)


def _end(processes: Sequence[WorkerProcess]) -> None:
    """End all at once; idle ones have time to close their environments first."""
    for process in processes:
        process.hang_up()
    start = time.monotonic()
    for process in sorted(processes, key=lambda process: not process.owes):
        end = start + (GRACE_S if process.owes else CLOSE_S)
        process.wait(max(0.0, end - time.monotonic()))
        if tail := process.stderr_tail():
            logger.debug("Worker %d wrote: %s", process.pid, tail)
        process.kill()
