"""Episodes with a model behind an endpoint: a thread and a collector for each, so none waits."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import NamedTuple

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


class Played(NamedTuple):
    """An episode, the tokens that it took, and what was out of the ordinary in it, by kind."""

    trajectory: Trajectory
    spent: Mapping[str, int]
    handled: Mapping[str, int]


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

    def play(self, episode: Episode, seat: Seat) -> Played:
        """The episode, played to its end or to what breaks it.

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
            # Nobody could have played from a prompt that never fits.
            if not (isinstance(error, ContextFullError) and trajectory.turns):
                trajectory.infra_error = str(error)
        finally:
            seat.release([episode.key])
        for turn, messages in zip(trajectory.turns, responder.sent, strict=False):
            turn.messages = messages
        spent = {"prompt": responder.prompt_tokens, "completion": responder.completion_tokens}
        return Played(trajectory, spent, responder.handled)


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
) -> list[Played]:
    """Play ``episodes``, at most ``concurrency`` at once; finished ones go into ``store``.

    Returns:
        The episodes that something outside the policy broke.

    Raises:
        EndpointError: Nothing can be played; what was finished is kept.
    """

    def run(episode: Episode) -> Played | None:
        try:
            endpoint.check_open()
            seat = Seat(*tables[episode.group % len(tables)])
            done = player.play(episode, seat)
        except StoppedError:
            return None
        if done.trajectory.infra_error is None:
            store.add(*done)
        return done

    with contextlib.ExitStack() as stack:
        # A seat for each episode, in as many processes as the DataModule has workers.
        tables = []
        for _ in range(min(datamodule.workers, len(episodes))):
            pool = EnvPool(datamodule.env_factory(), workers=1, **datamodule.pool_settings)
            tables.append((stack.enter_context(contextlib.closing(pool)), threading.Lock()))
        # Threads are not waited for longer than their present request takes.
        threads = ThreadPoolExecutor(concurrency, "episode")
        stack.callback(threads.shutdown, cancel_futures=True)
        stack.callback(endpoint.stop)
        meter = stack.enter_context(Meter("evaluation", len(episodes)))
        futures = [threads.submit(run, episode) for episode in episodes]
        played = []
        try:
            for future in as_completed(futures):
                done = future.result()
                played.append(done)
                meter.played([done.trajectory] if done else [])
        except EndpointError as error:
            raise EndpointError(
                f"{error}\n{len(store.episodes)} finished episodes are kept in {store.path}: the "
                "same command plays the rest."
            ) from None
    return [done for done in played if done and done.trajectory.infra_error]
