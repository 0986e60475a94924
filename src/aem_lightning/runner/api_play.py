"""Episodes with a model behind an endpoint: a thread and a collector for each, so none waits."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import TypeVar

from aem_lightning.callbacks import Meter
from aem_lightning.datamodules import AgentDataModule
from aem_lightning.envs import EnvPool
from aem_lightning.rollout import (
    ChatResponder,
    Collector,
    ContextFullError,
    Endpoint,
    EndpointError,
    Episode,
    RequestError,
    RewardShaping,
    StoppedError,
)
from aem_lightning.runner.episode_store import EpisodeStore
from aem_lightning.types import EnvStep, ResetRequest, Trajectory

T = TypeVar("T")


@dataclass(frozen=True)
class Player:
    """How an episode is played with an endpoint.

    Attributes:
        responder: Makes the model's part of an episode.
        rewards: The reward shaping.
        max_turns: Turns after which an episode is cut.
    """

    responder: Callable[[], ChatResponder]
    rewards: RewardShaping
    max_turns: int

    def play(self, episode: Episode, seat: Seat) -> tuple[Trajectory, dict[str, int]]:
        """The episode and the tokens that it took.

        Raises:
            EndpointError: Nothing can be played.
            StoppedError: The run ends before the episode does.
        """
        responder = self.responder()
        collector = Collector(
            pool=seat,
            encoder=responder.encoder,
            responder=responder,
            rewards=self.rewards,
            max_turns=self.max_turns,
            # Prompts are empty: the endpoint knows its context.
            max_context=responder.max_new_tokens,
            max_new_tokens=responder.max_new_tokens,
            concurrency=1,
        )
        try:
            (trajectory,) = collector.collect([episode])
        except RequestError as error:
            trajectory = responder.live[episode.key].trajectory
            trajectory.truncated = True
            if not isinstance(error, ContextFullError):
                trajectory.infra_error = str(error)
        finally:
            seat.release([episode.key])
        spent = {"prompt": responder.prompt_tokens, "completion": responder.completion_tokens}
        return trajectory, spent


@dataclass(slots=True)
class Seat:
    """One episode's place in a pool that other threads play with too: one call at a time."""

    pool: EnvPool
    lock: threading.Lock
    _answers: Mapping[str, EnvStep] = field(default_factory=dict, init=False)

    def send(
        self,
        requests: Mapping[str, ResetRequest] | None = None,
        actions: Mapping[str, str] | None = None,
    ) -> None:
        """Play; `receive` hands over the answers."""
        if requests or actions:
            with self.lock:
                self.pool.send(requests, actions)
                self._answers = self.pool.receive()

    def receive(self) -> Mapping[str, EnvStep]:
        """The answers to the last `send`."""
        answers, self._answers = self._answers, {}
        return answers

    def release(self, keys: Iterable[str]) -> None:
        """Forget episodes."""
        with self.lock:
            self.pool.release(keys)


def play(
    endpoint: Endpoint,
    player: Player,
    episodes: Sequence[Episode],
    datamodule: AgentDataModule,
    store: EpisodeStore,
    concurrency: int,
) -> list[Trajectory]:
    """Play ``episodes``, at most ``concurrency`` at once; finished ones go into ``store``.

    Returns:
        The episodes that something outside the policy broke.

    Raises:
        EndpointError: Nothing can be played; what was finished is kept.
    """

    def run(episode: Episode) -> Trajectory | None:
        try:
            endpoint.check_open()
            trajectory, spent = player.play(episode, seat(episode))
        except StoppedError:
            return None
        if trajectory.infra_error is None:
            store.add(trajectory, spent)
        return trajectory

    with (
        _seats(datamodule, len(episodes)) as seat,
        _threads(endpoint, concurrency) as threads,
    ):
        futures = [threads.submit(run, episode) for episode in episodes]
        try:
            played = [future.result() for future in _shown(futures)]
        except EndpointError as error:
            raise EndpointError(
                f"{error}\n{len(store.episodes)} finished episodes are kept in {store.path}: the "
                "same command plays the rest."
            ) from None
    return [trajectory for trajectory in played if trajectory and trajectory.infra_error]


@contextlib.contextmanager
def _seats(datamodule: AgentDataModule, episodes: int) -> Iterator[Callable[[Episode], Seat]]:
    """A seat for each episode, in as many processes as the DataModule has workers."""
    tables = [
        (
            EnvPool(datamodule.env_factory(), workers=1, **datamodule.pool_settings),
            threading.Lock(),
        )
        for _ in range(min(datamodule.workers, episodes))
    ]
    try:
        yield lambda episode: Seat(*tables[episode.group % len(tables)])
    finally:
        for pool, _ in tables:
            pool.close()


@contextlib.contextmanager
def _threads(endpoint: Endpoint, concurrency: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that are not waited for longer than their present request takes."""
    threads = ThreadPoolExecutor(concurrency, "episode")
    try:
        yield threads
    finally:
        endpoint.stop()
        threads.shutdown(cancel_futures=True)


def _shown(futures: Sequence[Future[T]]) -> Iterator[Future[T]]:
    """The futures as they are done, counted where a person sees it."""
    with Meter("evaluation", len(futures)) as meter:
        for future in as_completed(futures):
            meter.add()
            yield future
