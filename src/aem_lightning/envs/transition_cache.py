"""A memory of transitions: what a deterministic environment answered is not asked again.

The copies of a group walk the same states, above all once a policy has made up its mind, and so do
replays. `TransitionCache` looks an action up by the start state and the actions before it; the
environment itself is brought up to date only when an action comes that nobody has sent before. One
that tells its ``state_key`` is remembered by that: ways that lead to one state go on as one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from aem_lightning.envs.base import Reset, Step, TextEnv


@dataclass(slots=True, eq=False)
class _State:
    """What actions are answered, and the states that they lead to."""

    after: dict[str, tuple[Step, _State]] = field(default_factory=dict)


@dataclass(slots=True)
class _Start:
    """The answer to a reset, where it leads, and the states that are known by their key."""

    answer: Reset
    state: _State = field(default_factory=_State)
    states: dict[Hashable, _State] = field(default_factory=dict)


class TransitionStore:
    """Known transitions from every start state; the start states used last are kept.

    Args:
        max_transitions: Answers kept at most (a few hundred bytes to a few kilobytes each).

    Attributes:
        hits: Answers given from memory, since `take_counts`.
        misses: Answers that the environment was asked for, since `take_counts`.
    """

    def __init__(self, max_transitions: int = 30_000) -> None:
        self.max_transitions = max_transitions
        self.hits = 0
        self.misses = 0
        self._starts: OrderedDict[Hashable, _Start] = OrderedDict()
        self._sizes: dict[Hashable, int] = {}
        self._total = 0

    def __len__(self) -> int:
        return self._total

    def take_counts(self) -> dict[str, int]:
        """Hits and misses, which then start from 0 again."""
        counts = {"cache_hits": self.hits, "cache_misses": self.misses}
        self.hits = self.misses = 0
        return counts

    def start(self, key: Hashable) -> _Start | None:
        """What is known of the start state of ``key``."""
        if key not in self._starts:
            return None
        self._starts.move_to_end(key)
        return self._starts[key]

    def add_start(self, key: Hashable, answer: Reset, name: Hashable) -> _Start:
        """Remember the answer to a reset, and its state under ``name``."""
        start = self._starts[key] = _Start(answer)
        if name is not None:
            start.states[name] = start.state
        self._count(key)
        return start

    def add(self, key: Hashable, state: _State, action: str, answer: Step, name: Hashable) -> None:
        """Remember the answer to ``action`` in ``state``, of the start state behind ``key``.

        It leads to the state of this ``name``, or to one of its own where that is ``None``.
        """
        after, start = _State(), self._starts.get(key)
        if name is not None and start is not None:
            after = start.states.setdefault(name, after)
        state.after[action] = answer, after
        if start is not None:  # else it was dropped while its episode went on
            self._count(key)

    def _count(self, key: Hashable) -> None:
        self._sizes[key] = self._sizes.get(key, 0) + 1
        self._total += 1
        while self._total > self.max_transitions and len(self._starts) > 1:
            dropped, _ = self._starts.popitem(last=False)
            self._total -= self._sizes.pop(dropped)


@cache
def shared_store(*equal: str) -> TransitionStore:
    """The store of all environments of this process of which ``equal`` is the same."""
    return TransitionStore()


class TransitionCache:
    """A `TextEnv` that answers for a deterministic one, from memory where it can.

    The answers of that one depend on the reset's options and the actions alone, so copies with
    different seeds share their transitions.
    """

    def __init__(self, env: TextEnv, store: TransitionStore) -> None:
        self._env = env
        self._store = store
        self._key: Hashable = None
        self._state: _State | None = None
        self._at: _State | None = None  # where the environment is
        self._behind: list[tuple[str, _State]] = []  # actions it has not seen yet, and their ends
        self._unopened: tuple[int | None, Mapping[str, Any]] | None = None  # a reset not seen yet

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> Reset:
        """Start ``options["task_id"]``, from memory where it is known."""
        given = dict(options or {})
        self._key = tuple(sorted(given.items()))
        start = self._store.start(self._key)
        self._behind = []
        if start is None:
            self._unopened = None
            answer = self._env.reset(seed=seed, options=given)
            self._store.misses += 1
            start = self._store.add_start(self._key, answer, self._state_key())
        else:
            self._unopened = (seed, given)
            self._store.hits += 1
        self._state = self._at = start.state
        observation, info = start.answer
        return observation, dict(info)

    def step(self, action: str) -> Step:
        """The answer to ``action``, from memory where it is known."""
        if self._state is None:
            raise RuntimeError("step before reset: call reset(options={'task_id': ...}) first")
        state = self._state
        known = action in state.after
        if not known:
            self._catch_up()
            answer = self._env.step(action)
            self._store.misses += 1
            if answer[-1].get("infra_error"):  # not remembered: it may work the next time
                self._state = self._at = _State()
                return answer
            self._store.add(self._key, state, action, answer, self._state_key())
        answer, self._state = state.after[action]
        if known:
            self._store.hits += 1
            self._fall_behind(action, self._state)
        else:
            self._at = self._state
        observation, reward, terminated, truncated, info = answer
        return observation, reward, terminated, truncated, dict(info)

    def _fall_behind(self, action: str, end: _State) -> None:
        """Note what the environment has to be told, should it be asked: no way round in circles."""
        states = [self._at, *(state for _, state in self._behind)]
        if end in states:
            del self._behind[states.index(end) :]
        else:
            self._behind.append((action, end))

    def _state_key(self) -> Hashable:
        key: Hashable = getattr(self._env, "state_key", None)
        return key

    def _catch_up(self) -> None:
        """Bring the environment to the state that memory has led to."""
        if self._unopened is not None:
            seed, options = self._unopened
            self._env.reset(seed=seed, options=options)
            self._unopened = None
        while self._behind:
            action, self._at = self._behind.pop(0)
            self._env.step(action)

    def counters(self) -> dict[str, int]:
        """Hits and misses of all that share the store, since last asked."""
        return self._store.take_counts()

    def close(self) -> None:
        """Close the environment; the store stays."""
        self._env.close()
