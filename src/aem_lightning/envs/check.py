"""The contract of an environment, as a check that anyone can run on theirs."""

from __future__ import annotations

import logging
import os
import pickle
import random
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any, Protocol, cast

from aem_lightning.envs.base import EnvContractError, EnvPoolError, Reset, TextEnv
from aem_lightning.envs.examined import EnvBreach, EnvLost, ExaminedEnv, RemoteEnv
from aem_lightning.envs.leaks import find_leaks
from aem_lightning.envs.payment import Shaping, lost_rewards
from aem_lightning.envs.pool import EnvPool
from aem_lightning.envs.trial import ActionWords, Trial, pick
from aem_lightning.types import Task

logger = logging.getLogger(__name__)

TIMEOUT_S = 60.0  # where no DataModule says another
WALKS = 4
HOW = "defaults: [custom, override /rewards@_global_.rewards: ...]"
LONG_WALK = 50  # turns, to see what an environment pays


class TaskSource(Protocol):
    """The part of an `AgentDataModule` that the contract is about."""

    train_split: str

    @property
    def evaluation_splits(self) -> Sequence[str]: ...

    def tasks(self, split: str) -> list[Task]: ...

    def env_factory(self) -> Callable[[], TextEnv]: ...


def check_env(
    environment: TaskSource | Callable[[], TextEnv],
    tasks: Sequence[Task] | None = None,
    *,
    prompt: ActionWords | None = None,
    rewards: Shaping | None = None,
    seed: int = 0,
    turns: int = 8,
    resets: int = 200,
    tasks_per_split: int = 4,
) -> list[str]:
    """Prove that an environment keeps the contract of `TextEnv`; what was proved, a line each.

    The splits: the training and the evaluation tasks are disjoint, and asked for again they are the
    same. The factory can be pickled and makes an object with ``reset``, ``step`` and ``close``. All
    else happens in a worker process, where nothing is waited for longer than the DataModule's
    ``timeout_s``. For every task tried: answers have the types of the contract, two copies start
    alike and answer the same actions alike; every admissible action is accepted, nonsense and an
    empty action are marked by ``is_action_valid=False``; with a
    ``prompt``, its words tell malformed from inadmissible; a reset in the middle of an episode and
    one after an exception lead back to the start. Tasks that list their actions start differently,
    or answer differently. Many resets leave no file, thread or memory behind; a worker process that
    is killed is replaced and the episode goes on. ``close`` may be called twice.

    The last two, over processes and many resets, follow where all before them is well. A line that
    loads torch, Lightning or transformers into the worker is no breach: a warning names it. So does
    one where ``rewards`` make nothing of the rewards or wins that are seen.

    Args:
        environment: A DataModule, or a function that makes one environment, together with
            ``tasks``.
        tasks: Tasks to try; ``None`` takes some of every split of the DataModule.
        prompt: How actions are written as responses.
        rewards: What the run makes of an answer.
        seed: Seed given to ``reset``, and of the actions tried.
        turns: Actions tried in each task.
        resets: Episodes that must leave nothing behind; 0 tries none.
        tasks_per_split: Tasks of each split to try, evenly spaced.

    Raises:
        EnvContractError: Every breach found: the method, what it returned, and what was expected.
        ValueError: There are no tasks to try.
    """
    breaches: list[str] = []
    told: list[str] = []
    if tasks is None:
        source = cast(TaskSource, environment)
        tasks = _check_splits(source, tasks_per_split, breaches)
        make_env, told = source.env_factory(), _told_splits(source)
    else:
        make_env = cast(Callable[[], TextEnv], environment)
        breaches += _check_ids(tasks)
    if not tasks and not breaches:
        raise ValueError("check_env got no tasks; give at least one")
    effort = _Effort(seed, turns, resets, rewards)
    settings = {
        "timeout_s": getattr(environment, "timeout_s", TIMEOUT_S),
        **getattr(environment, "pool_settings", {}),
    }
    breaches += _check_in_worker(make_env, tasks, effort, prompt, settings)
    if breaches:
        raise EnvContractError(
            f"{len(breaches)} breaches of the TextEnv contract:\n- " + "\n- ".join(breaches)
        )
    return [*told, *effort.told(len(tasks), prompt)]


@dataclass(frozen=True)
class _Effort:
    seed: int
    turns: int
    resets: int
    rewards: Shaping | None = None

    def told(self, tasks: int, prompt: ActionWords | None) -> list[str]:
        """What has been proved of that many tasks."""
        words = "nonsense and an empty action are marked invalid"
        if prompt is not None:
            words += ", and the prompt's words tell malformed from inadmissible"
        return [
            f"{tasks} tasks tried, up to {self.turns} turns each: under seed {self.seed} two "
            "copies start alike and answer alike",
            f"every admissible action tried is accepted; {words}",
            "a reset in the middle of an episode, or after an exception, leads back to the start",
            "tasks that list their actions start differently, or answer differently",
            *([f"{self.resets} episodes leave nothing behind"] if self.resets else []),
            "a killed worker is replaced, and its episode goes on; closing twice does no harm",
        ]


def _told_splits(source: TaskSource) -> list[str]:
    splits = (source.train_split, *source.evaluation_splits)
    sizes = ", ".join(f"{split} {len(source.tasks(split))}" for split in splits)
    return [f"tasks: {sizes}; none of the evaluation's is trained on, and the lists stay the same"]


def _check_in_worker(
    make_env: Callable[[], TextEnv],
    tasks: Sequence[Task],
    effort: _Effort,
    prompt: ActionWords | None,
    settings: Mapping[str, Any],
) -> list[str]:
    """The breaches that playing shows; what does not come back ends the trials."""
    try:
        factory = pickle.dumps(make_env)
        pickle.loads(factory)
    except Exception as error:
        return [
            f"make_env={make_env!r} cannot be pickled ({error}); expected: a class or function of "
            "an importable module, or a functools.partial of one"
        ]
    breaches: list[str] = []
    with EnvPool(partial(ExaminedEnv, factory), **{**settings, "workers": 1}) as pool:
        pool.mend_quietly()  # a worker is killed on purpose
        envs = RemoteEnv(pool, "one"), RemoteEnv(pool, "copy")
        try:
            for env in envs:
                env.make()
        except EnvContractError as error:
            return [str(error)]
        except Exception as error:
            told = error if isinstance(error, EnvPoolError) else f"{type(error).__name__}: {error}"
            return [f"make_env() raised {told}; expected: an environment"]
        try:
            _check_episodes(pool, envs, tasks, effort, prompt, breaches)
            for env in envs:
                breaches += _check_close(env)
        except EnvLost as lost:
            breaches.append(f"{lost}. Nothing was tried after that")
    return breaches


def _check_episodes(
    pool: EnvPool,
    envs: tuple[RemoteEnv, RemoteEnv],
    tasks: Sequence[Task],
    effort: _Effort,
    prompt: ActionWords | None,
    breaches: list[str],
) -> None:
    """The breaches of every task; what takes a while only where there are none.

    Raises:
        EnvLost: A call did not come back.
    """
    starts = {}
    env = envs[0]
    for number, task in enumerate(tasks, 1):
        logger.info("check: task %d of %d, %s", number, len(tasks), task.id)
        trial = Trial(envs, task, effort.seed, effort.turns, breaches, prompt)
        if (start := trial.run()) is not None:
            starts[task.id] = start
    try:
        if not breaches:
            breaches += _check_differences(env, starts, effort)
        if not breaches and effort.rewards:
            for task in tasks[:WALKS]:
                _walk(env, task.id, replace(effort, turns=LONG_WALK), 0)
            if lost := lost_rewards([*env.paid.values()], effort.rewards):
                logger.warning("%s. An environment decides for itself in its YAML: %s", lost, HOW)
        if not breaches and effort.resets:
            logger.info("check: what %d episodes leave behind", effort.resets)
            sizes = {"seed": effort.seed, "resets": effort.resets}
            breaches += find_leaks(env, tasks, **sizes, count=pool.counters)
        if not breaches:
            logger.info("check: a worker that is killed in the middle of an episode")
            breaches += _check_crash(pool, env, tasks[0], starts[tasks[0].id], effort)
    except EnvBreach as breach:
        breaches.append(str(breach))


def _check_splits(source: TaskSource, count: int, breaches: list[str]) -> list[Task]:
    """Some tasks of every split, after a look at all of them."""
    chosen: list[Task] = []
    train = {task.id for task in source.tasks(source.train_split)}
    for split in (source.train_split, *source.evaluation_splits):
        tasks = source.tasks(split)
        if not tasks:
            breaches.append(f"tasks({split!r}) returned []; expected at least one task")
            continue
        if source.tasks(split) != tasks:
            breaches.append(
                f"tasks({split!r}) returned other tasks the second time; expected the same list"
            )
        breaches += [f"tasks({split!r}): {breach}" for breach in _check_ids(tasks)]
        shared = sorted(train.intersection(task.id for task in tasks))
        if split != source.train_split and shared:
            breaches.append(
                f"tasks({split!r}) returned {len(shared)} tasks of tasks({source.train_split!r}), "
                f"e.g. {shared[:3]}; expected none, since evaluation is on tasks never trained on"
            )
        number = min(count, len(tasks))
        chosen += [tasks[i * len(tasks) // number] for i in range(number)]
    return chosen


def _check_ids(tasks: Iterable[Task]) -> list[str]:
    ids = [task.id for task in tasks]
    twice = sorted({i for i in ids if ids.count(i) > 1}) if len(set(ids)) < len(ids) else []
    return [f"task ids given more than once: {twice}; expected: unique ids"] if twice else []


def _check_differences(env: TextEnv, starts: dict[str, Reset], effort: _Effort) -> list[str]:
    """Tasks that cannot be told apart, whether by their starts or by what is done in them.

    Where a start lists no actions, nothing can be tried: the difference may be hidden.
    """
    breaches = []
    for one, other in combinations(starts, 2):
        seen = [_visible(*starts[task]) for task in (one, other)]
        if seen[0] != seen[1] or not starts[one][1].get("admissible_actions"):
            continue
        if all(
            _walk(env, one, effort, key) == _walk(env, other, effort, key) for key in range(WALKS)
        ):
            breaches.append(
                f"reset(options={{'task_id': {other!r}}}) returned the start of task {one!r}, "
                f"{starts[one][0]!r}, and the same answers to {WALKS} walks of {effort.turns} "
                "actions; expected: another start state, which the task_id decides"
            )
    return breaches


def _visible(observation: str, info: dict[str, Any]) -> tuple[Any, ...]:
    return observation, info.get("goal"), tuple(info.get("admissible_actions") or ())


def _walk(env: TextEnv, task_id: str, effort: _Effort, key: int) -> list[Any]:
    """What is seen on a random walk that ``key`` decides."""
    rng = random.Random(f"{effort.seed}/{key}")
    _, info = env.reset(seed=effort.seed, options={"task_id": task_id})
    seen: list[Any] = []
    for _ in range(effort.turns):
        observation, reward, terminated, truncated, info = env.step(pick(rng, info))
        seen.append((_visible(observation, info), reward, terminated, truncated, info.get("won")))
        if terminated or truncated:
            break
    return seen


def _check_crash(
    pool: EnvPool, env: RemoteEnv, task: Task, start: Reset, effort: _Effort
) -> list[str]:
    """Kill the worker that plays an episode: a new one has to bring it back.

    A line of the environment that loads what a worker does without is warned of.
    """
    action = pick(random.Random(effort.seed), start[1])
    pool.release(["copy"])
    env.reset(seed=effort.seed, options={"task_id": task.id})
    os.kill(pool.worker_pids()[0], signal.SIGKILL)
    try:
        env.step(action)
    except EnvLost as lost:
        return [
            f"task {task.id!r}: reset() and step({action!r}) after a crash of the worker process "
            f"gave infra_error={lost.reason!r}; expected: the episode as it was before"
        ]
    for line, packages in env.imports.items():
        logger.warning(
            "%s\n  loads %s in every environment worker, which then takes seconds to start and "
            "hundreds of MB. If the environment itself needs it, leave it; else move the import "
            "into the functions that use it",
            line,
            ", ".join(packages),
        )
    return []


def _check_close(env: RemoteEnv) -> list[str]:
    try:
        env.close()
    except EnvBreach as breach:
        return [f"{breach}; expected: no effect"]
    return []
