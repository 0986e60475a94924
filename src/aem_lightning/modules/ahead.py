"""Asynchronous rollouts: the next iteration's episodes are played while this one updates.

A thread plays, with the policy as it was when the update began: from the second iteration on, a run
learns from episodes that are one update old. torch lets go of the interpreter in every operation,
and a server is only waited for. What is played depends on weights and seeds alone, never on how far
the update is, so one seed gives the same bits again.

The log-probabilities of the policy that played are those that its engine gave: the loss weighs each
token by truncated importance sampling between them and the policy that learns. A checkpoint keeps
the trainable weights that play next, so a run that goes on plays what it would have played.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import torch
from torch import Tensor

from aem_lightning.algorithms import ClippedLoss, ImportanceCorrection, Loss
from aem_lightning.modules.dynamic_sampling import group_source
from aem_lightning.modules.policy import Policy
from aem_lightning.rollout import SlotEngine
from aem_lightning.types import Task, Trajectory

log = logging.getLogger(__name__)


class RolloutStopped(Exception):  # noqa: N818 (nothing went wrong)
    """The rollout under way is not wanted any more."""


@dataclass(frozen=True)
class Playing:
    """A rollout under way: what it is wanted for, and what comes of it."""

    iteration: int
    tasks: list[Task]
    settings: Any
    played: Future[list[Trajectory]]
    thread: threading.Thread


class Ahead(L.Callback):
    """Plays one iteration ahead; an agent with ``lag=1`` brings it along.

    torch's threads are shared out between the two. A validation waits for the rollout under way,
    and has the environments and all threads then.

    Attributes:
        staleness: Iterations between the weights that played what `collect` gave last and those
            that learn from it.
    """

    def __init__(self) -> None:
        self.staleness = 0
        self._agent: Any = None
        self._sampler: Policy | None = None
        self._weights: dict[int, tuple[int, dict[str, Tensor]]] = {}  # of its versions, and whence
        self._playing: Playing | None = None
        self._unwanted = threading.Event()
        self._threads = torch.get_num_threads()

    def collect(self, agent: Any, tasks: Sequence[Task]) -> list[Trajectory]:
        """The trajectories of this iteration; those of the next one are begun."""
        now, playing = agent.iteration, self._playing
        wanted = now, [*tasks], agent.rollout
        if playing is not None and (playing.iteration, playing.tasks, playing.settings) != wanted:
            log.warning("these are not the tasks or settings played ahead: played anew")
            self.stop()
        playing = self._playing or self._begin(agent, *wanted)
        trajectories = playing.played.result()
        self.staleness = now - self._weights[now][0]
        self._playing, self._weights = None, {now: self._weights[now]}
        self._keep_weights(agent, now + 1)  # a run may go on behind its last iteration, too
        coming = agent.trainer.datamodule.tasks_after(now)
        if coming is not None:
            self._begin(agent, now + 1, coming, agent.rollout)
        torch.set_num_threads(max(1, self._threads - self._share))
        return trajectories

    def _keep_weights(self, agent: Any, iteration: int) -> None:
        """Let the present weights play ``iteration``, where there are none for it yet."""
        if iteration not in self._weights:
            weights = {name: p.detach().clone() for name, p in agent.policy.trainable().items()}
            self._weights[iteration] = agent.iteration, weights

    def _begin(self, agent: Any, iteration: int, tasks: list[Task], settings: Any) -> Playing:
        """Let ``iteration`` be played."""
        self._unwanted.clear()
        self._keep_weights(agent, iteration)
        version, weights = self._weights[iteration]
        if self._sampler is None:
            self._sampler = with_own_adapters(agent.policy)
            self._sampler.head.decoder.register_forward_pre_hook(self._go_on)
        with torch.no_grad():
            for name, parameter in self._sampler.trainable().items():
                parameter.copy_(weights[name])
        agent.engine.sync(self._sampler, version)
        source = group_source(agent, tasks, self._sampler, iteration)
        make, shown = source.collector, agent.episodes_over
        changes: dict[str, Any] = {
            "before_pass": self._go_on,
            "must_fit": iteration == 0,
            "episodes_over": shown if iteration == agent.iteration else None,
        }
        source.collector = lambda seed: replace(make(seed), **changes)
        kind = agent.device.type
        autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        played = Future[list[Trajectory]]()

        def play() -> None:
            torch.set_num_threads(self._share)
            # As where the trainer is, but for autocast's cache, which is that of all threads.
            torch.set_autocast_enabled(kind, autocast[0])
            torch.set_autocast_dtype(kind, autocast[1])
            torch.set_autocast_cache_enabled(False)
            try:
                played.set_result(source.collect(tasks, settings.collection_rounds))
            except BaseException as error:  # raised where the episodes are wanted
                played.set_exception(error)

        thread = threading.Thread(target=play, name="rollout", daemon=True)
        self._playing = Playing(iteration, tasks, settings, played, thread)
        thread.start()
        return self._playing

    @property
    def _share(self) -> int:
        """Of torch's threads, those of a rollout; in every one, for bits may hang on it."""
        return max(1, self._threads // 2)

    def _go_on(self, *_: Any) -> None:
        if self._unwanted.is_set():
            raise RolloutStopped

    def stop(self) -> None:
        """End the rollout under way; environments that were in it start anew where needed."""
        torch.set_num_threads(self._threads)
        playing, self._playing = self._playing, None
        if playing is None:
            return
        was_done = playing.played.done()
        self._unwanted.set()
        playing.thread.join()
        if not was_done:
            getattr(self._agent.engine, "release", bool)()
            self._agent.trainer.datamodule.close()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot be; an evaluation plays nothing ahead."""
        self._agent = pl_module
        if stage == "fit":
            check_lag(trainer, self._agent.engine)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wait: one engine and the same environments play now, with the current weights."""
        if self._playing is not None:
            self._playing.played.result()
        torch.set_num_threads(self._threads)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What was played ahead of an early end is not wanted."""
        self.stop()

    def on_exception(self, *_: Any) -> None:
        """Nor is it after an error, or a signal."""
        self.stop()

    def state_dict(self) -> dict[str, Any]:
        """The weights that play the next iteration, and the iteration that they are of."""
        version, weights = self._weights.get(self._agent.iteration, (None, None))
        return {"version": version, "weights": weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let them play it."""
        if state_dict["weights"] is not None:
            at = self._agent.iteration
            self._weights = {at: (state_dict["version"], state_dict["weights"])}


def with_own_adapters(policy: Policy) -> Policy:
    """A copy of ``policy`` with trainable weights of its own; the frozen ones are the same."""
    shared = [*policy.buffers(), *(p for p in policy.parameters() if not p.requires_grad)]
    return copy.deepcopy(policy, {id(part): part for part in [*shared, policy.tokenizer]})


def corrected(loss: Loss) -> Loss:
    """``loss`` with truncated importance sampling, where it can have it and has none yet."""
    if isinstance(loss, ClippedLoss) and loss.correction is None:
        return replace(loss, correction=ImportanceCorrection())
    return loss


def check_lag(trainer: L.Trainer, engine: Any) -> None:
    """Raise where no rollout can be played beside an update.

    Raises:
        ValueError: Several ranks, or an engine in this process on a GPU.
    """
    if trainer.world_size > 1:
        raise ValueError(
            f"rollout.lag=1 on {trainer.world_size} ranks: they talk to each other in a rollout "
            "and in an update, and cannot in both at once. Type rollout.lag=0, or trainer.devices=1"
        )
    device = trainer.strategy.root_device
    if device.type != "cpu" and isinstance(engine, SlotEngine):
        raise ValueError(
            f"rollout.lag=1 with an engine in this process on {device}: sampling and learning "
            "would wait for each other there. Type engine=vllm, or rollout.lag=0"
        )
