"""The collector: plays episodes with whoever answers, a policy's engine or an expert.

There is no barrier between turns. While the engine decodes some episodes, the environments play
others. Who comes next is decided by counting responses, never by the clock: once a share of the
responses under way has finished, the answers of the environments that played meanwhile are taken in
(and waited for, where they are late) and their episodes join the batch. So which responses share a
batch, and with it every bit of the rollout, is the same on every run, however long anything took.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from typing import Protocol, TypeVar

from aem_lightning.beats import beat
from aem_lightning.rollout.constraint import Constraint
from aem_lightning.rollout.encoder import Encoder
from aem_lightning.rollout.engine import Request, Result, RolloutEngine, Sampling
from aem_lightning.rollout.finite import NotFiniteError, place_of
from aem_lightning.rollout.rewards import BadRewardError, RewardShaping
from aem_lightning.types import EnvStep, ResetRequest, Task, Trajectory, Turn

log = logging.getLogger(__name__)

T = TypeVar("T")
EpisodesOver = Callable[[Sequence[Trajectory]], object]
"""Is told of the episodes that have just ended."""


def stable_seed(*parts: object) -> int:
    """A 63-bit seed that depends on ``parts`` alone, in every process and on every machine."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True, slots=True)
class Episode:
    """An episode to play: copy number ``copy`` of ``task``, in group ``group``.

    ``repeat`` tells the groups of one task apart, where a task is played in more than one.
    """

    task: Task
    group: int
    copy: int
    repeat: int = 0

    @property
    def key(self) -> str:
        return f"{self.group}/{self.copy}"


def make_groups(tasks: Iterable[Task], group_size: int, first_group: int = 0) -> list[Episode]:
    """``group_size`` copies of every task; one group for each entry of ``tasks``."""
    episodes = []
    seen: Counter[str] = Counter()
    for group, task in enumerate(tasks, first_group):
        repeat = seen[task.id]
        seen[task.id] += 1
        episodes += [Episode(task, group, copy, repeat) for copy in range(group_size)]
    return episodes


@dataclass(slots=True)
class Live:
    """An episode in play: its trajectory, the environment's last word, the prompt to answer.

    ``constraint`` says what the answer may be.
    """

    episode: Episode
    trajectory: Trajectory
    step: EnvStep
    prompt: list[int]
    constraint: Constraint | None = None


class Responder(Protocol):
    """Whoever answers prompts."""

    def ask(self, live: Mapping[str, Live]) -> None:
        """Hand over the prompts of ``live``; the answers come later."""
        ...

    def answers(self) -> Sequence[Result]:
        """One answer or more to what was asked; which ones does not hang on timing."""
        ...

    def forget(self, keys: Iterable[str]) -> None:
        """The episodes ``keys`` are over."""
        ...


class EnvironmentPool(Protocol):
    """The part of `EnvPool` that a collector uses."""

    def send(
        self,
        requests: Mapping[str, ResetRequest] | None = None,
        actions: Mapping[str, str] | None = None,
    ) -> None: ...

    def receive(self) -> Mapping[str, EnvStep]: ...

    def release(self, keys: Iterable[str]) -> None: ...


@dataclass(slots=True)
class EngineResponder:
    """The policy, through a rollout engine.

    The seed of a response is a function of ``seed``, the task, the copy and the turn alone, so
    neither the order of the tasks nor how many are played at once changes what is sampled.

    Attributes:
        engine: The engine.
        sampling: How responses are drawn.
        seed: Key of every draw.
        share: Of the responses under way, how many have to finish before the environments get
            their actions and the waiting episodes their turn. Little keeps the batch full, much
            computes more prompts at once; 1 is a barrier between turns.
    """

    engine: RolloutEngine
    sampling: Sampling
    seed: tuple[object, ...]
    share: float = 0.5
    _under_way: int = field(default=0, init=False)
    _asked: dict[str, Live] = field(default_factory=dict, init=False, repr=False)

    def ask(self, live: Mapping[str, Live]) -> None:
        self.engine.submit(
            Request(key, item.prompt, self.sampling, self._seed(item), item.constraint)
            for key, item in live.items()
        )
        self._under_way += len(live)
        self._asked |= live

    def answers(self) -> Sequence[Result]:
        try:
            results = self.engine.poll(at_least=max(1, math.ceil(self.share * self._under_way)))
        except NotFiniteError as error:  # an engine knows of no task
            item = self._asked.get(error.said.partition(":")[0])
            if item is not None:
                error.place = place_of(item.trajectory, len(item.trajectory.turns))
            raise
        self._under_way -= len(results)
        return results

    def forget(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.engine.close(key)
            self._asked.pop(key, None)

    def _seed(self, item: Live) -> int:
        episode, turn = item.episode, len(item.trajectory.turns)
        return stable_seed(*self.seed, episode.task.id, episode.repeat, episode.copy, turn)


@dataclass(slots=True)
class Collector:
    """Plays episodes to their end, at most ``concurrency`` at once; finished ones make room.

    Attributes:
        pool: Where the environments live.
        encoder: Messages to token ids.
        responder: Who answers.
        rewards: The reward shaping.
        max_turns: Turns after which an episode is cut.
        max_context: Tokens of prompt and response together after which an episode is cut.
        max_new_tokens: Room that a response needs.
        concurrency: Episodes in play at once.
        episodes_over: Is told of the episodes that have just ended.
        before_pass: Is called before every turn of the loop; what it raises ends the rollout.
        must_fit: Raise where no opening prompt of a `collect` fits; else its episodes only break.
        environment_seconds: Wall time spent waiting for environments so far.
    """

    pool: EnvironmentPool
    encoder: Encoder
    responder: Responder
    rewards: RewardShaping
    max_turns: int
    max_context: int
    max_new_tokens: int
    concurrency: int = 64
    episodes_over: EpisodesOver | None = None
    before_pass: Callable[[], object] = bool
    must_fit: bool = True
    environment_seconds: float = 0.0
    _starts: dict[int, tuple[Episode, EnvStep]] = field(
        default_factory=dict, init=False, repr=False
    )
    _overlong: list[str] = field(default_factory=list, init=False, repr=False)

    def collect(self, episodes: Sequence[Episode], *, seed: int = 0) -> list[Trajectory]:
        """The trajectories of ``episodes``, in their order.

        Args:
            episodes: What to play; keys must be unique.
            seed: Seed of the environments' own randomness; the copies of a group share it.

        An opening prompt that leaves no room for a response breaks its episode.

        Raises:
            ValueError: No opening prompt leaves room, or two copies of a group start in different
                states.
        """
        waiting = deque(episodes)
        live: dict[str, Live] = {}
        starting: dict[str, Episode] = {}
        played: dict[str, Trajectory] = {}
        self._starts.clear()
        self._overlong.clear()
        asked: set[str] = set()
        while waiting or live or starting:
            self.before_pass()
            # Environments work on what was sent at the end of a pass while responses are sampled
            # at the beginning of the next.
            results = sorted(self.responder.answers(), key=attrgetter("key")) if asked else []
            for result in results:
                self._record(live[result.key], result)
            steps = self._timed(self.pool.receive)
            self._take_in(steps, starting, live)
            over = [key for key in steps if self._is_over(live[key])]
            self.responder.forget(over)
            self.pool.release(over)
            ended = {key: live.pop(key).trajectory for key in over}
            played |= ended
            if ended and self.episodes_over is not None:
                self.episodes_over([*ended.values()])
            due = {key: live[key] for key in steps if key in live}
            self.responder.ask(due)
            asked = (asked | due.keys()) - {result.key for result in results}
            room = self.concurrency - len(live)
            starting = {
                e.key: e for e in (waiting.popleft() for _ in range(min(room, len(waiting))))
            }
            actions = {result.key: _sent_to_environment(live[result.key]) for result in results}
            requests = _reset_requests(starting, seed, self.uses_reward)
            self._timed(partial(self.pool.send, requests, actions))
        if self.must_fit and episodes and len(self._overlong) == len(episodes):
            raise ValueError(self._overlong[0])
        return [played[episode.key] for episode in episodes]

    def _take_in(
        self,
        steps: Mapping[str, EnvStep],
        starting: Mapping[str, Episode],
        live: dict[str, Live],
    ) -> None:
        """Let the environments' answers into their episodes; those that start join ``live``."""
        for key, step in steps.items():
            if key in starting:
                live[key] = self._open(starting[key], step)
            else:
                self._observe(live[key], step)

    def _open(self, episode: Episode, step: EnvStep) -> Live:
        trajectory = Trajectory(episode.task, episode.group, episode.copy)
        trajectory.infra_error = step.infra_error
        if step.infra_error is not None:
            return Live(episode, trajectory, step, [])
        first, start = self._starts.setdefault(episode.group, (episode, step))
        check_same_start(episode, step, first, start)
        prompt = self.encoder.first(step)
        if len(prompt) + self.max_new_tokens > self.max_context:
            trajectory.infra_error = self._refuse(episode, len(prompt))
            trajectory.truncated = True
        return Live(episode, trajectory, step, prompt, self.encoder.constraint(step))

    def _refuse(self, episode: Episode, tokens: int) -> str:
        """Why an opening prompt of so many tokens is not played; said once a group."""
        reason = (
            f"The opening prompt of task {episode.task.id!r} has {tokens} tokens; "
            f"with max_new_tokens={self.max_new_tokens} it does not fit into "
            f"max_context={self.max_context}. Type "
            f"max_context={tokens + 8 * self.max_new_tokens} or a shorter prompt."
        )
        if reason not in self._overlong:
            log.warning("%s Its group is left out", reason)
        self._overlong.append(reason)
        return reason

    def _record(self, item: Live, result: Result) -> None:
        """Append a response: to the last row where the prompt extends it, else to a new one."""
        beat("tokens", len(result.tokens))
        rows, prompt = item.trajectory.rows, item.prompt
        if rows and len(prompt) >= len(rows[-1]) and prompt[: len(rows[-1])] == rows[-1]:
            rows[-1] = prompt + list(result.tokens)
        else:
            rows.append(prompt + list(result.tokens))
        response = self.encoder.decode(result.tokens)
        action, malformed = self.encoder.prompt.read(response)
        item.trajectory.turns.append(
            Turn(
                observation=item.step.observation,
                admissible_actions=item.step.admissible_actions,
                response=response,
                action=action,
                row=len(rows) - 1,
                start=len(prompt),
                logprobs=list(result.logprobs),
                entropies=None if result.entropies is None else list(result.entropies),
                finish_reason=result.finish_reason,
                malformed=malformed,
            )
        )

    def _observe(self, item: Live, step: EnvStep) -> None:
        trajectory, turn = item.trajectory, item.trajectory.turns[-1]
        try:
            turn.reward = self.rewards(step, malformed=turn.action is None)
        except BadRewardError as error:
            where = f"task {trajectory.task.id!r}, turn {len(trajectory.turns) - 1}"
            step = replace(step, truncated=True, info={"infra_error": f"{where}: {error}"})
        turn.is_valid = turn.action is not None and step.is_action_valid
        trajectory.won = step.won
        trajectory.score = float(step.info.get("score", step.won))
        trajectory.infra_error = step.infra_error
        trajectory.reason = str(step.info.get("reason") or "")
        item.step = step
        if step.terminated or step.truncated or step.infra_error is not None:
            trajectory.truncated = step.truncated
            return
        item.prompt = self.encoder.next(step, trajectory)
        item.constraint = self.encoder.constraint(step)
        too_long = len(item.prompt) + self.max_new_tokens > self.max_context
        trajectory.truncated = too_long or len(trajectory.turns) >= self.max_turns

    @property
    def uses_reward(self) -> bool:
        """Whether the environment's own reward counts; one that does not is not looked at."""
        return bool(getattr(self.rewards, "environment", True))

    @staticmethod
    def _is_over(item: Live) -> bool:
        trajectory, step = item.trajectory, item.step
        broke = trajectory.infra_error is not None
        return broke or step.terminated or step.truncated or trajectory.truncated

    def _timed(self, call: Callable[[], T]) -> T:
        start = time.perf_counter()
        answer = call()
        self.environment_seconds += time.perf_counter() - start
        return answer


def check_same_start(episode: Episode, step: EnvStep, other: Episode, start: EnvStep) -> None:
    """Raise unless two copies of a group start alike: else their returns cannot be compared.

    Raises:
        ValueError: Naming the task, the copies and what differs.
    """
    pairs = {
        "observation": (start.observation, step.observation),
        "admissible_actions": (sorted(start.admissible_actions), sorted(step.admissible_actions)),
        "goal": (start.info.get("goal"), step.info.get("goal")),
    }
    for name, (one, another) in pairs.items():
        if one != another:
            raise ValueError(
                f"Copies {other.copy} and {episode.copy} of task {episode.task.id!r} start in "
                f"different states: the {name} is {str(one)[:200]!r} and {str(another)[:200]!r}. "
                "A group compares episodes from one start: reset(seed, options) must depend on "
                "the seed and the task_id alone. check_env finds what else it depends on."
            )


def _reset_requests(
    episodes: Mapping[str, Episode], seed: int, uses_reward: bool
) -> dict[str, ResetRequest]:
    """How the environments of ``episodes`` are to start; the copies of a task start alike."""
    return {
        key: ResetRequest(
            episode.task.id, stable_seed(seed, episode.task.id) % 2**31, episode.group, uses_reward
        )
        for key, episode in episodes.items()
    }


def _sent_to_environment(item: Live) -> str:
    """The action, or a malformed response's own words: the environment says what they are worth."""
    turn = item.trajectory.turns[-1]
    return turn.action if turn.action is not None else turn.response[-200:]
