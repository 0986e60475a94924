"""A memory of transitions: what a deterministic environment answered is not asked again.

The copies of a group walk the same states, above all once a policy has made up its mind, and so do
replays. `TransitionCache` looks an action up by the start state and the actions before it; the
environment itself is brought up to date only when an action comes that nobody has sent before.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aem_lightning.envs.base import Reset, Step, TextEnv


@dataclass(slots=True)
class _State:
    """The answer that led here, and the states that actions lead to."""

    answer: Step
    after: dict[str, _State] = field(default_factory=dict)


class TransitionStore:
    """Known transitions, a tree for every start state; the start states used last are kept.

    One store serves all environments of a process.

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
        self._starts: OrderedDict[Hashable, _State] = OrderedDict()
        self._sizes: dict[Hashable, int] = {}
        self._total = 0

    def __len__(self) -> int:
        return self._total

    def take_counts(self) -> dict[str, int]:
        """Hits and misses, which then start from 0 again."""
        counts = {"cache_hits": self.hits, "cache_misses": self.misses}
        self.hits = self.misses = 0
        return counts

    def start(self, key: Hashable) -> _State | None:
        """The known start state of ``key``."""
        if key not in self._starts:
            return None
        self._starts.move_to_end(key)
        return self._starts[key]

    def add_start(self, key: Hashable, answer: Step) -> _State:
        """Remember the answer to a reset."""
        state = self._starts[key] = _State(answer)
        self._count(key)
        return state

    def add(self, key: Hashable, state: _State, action: str, answer: Step) -> _State:
        """Remember the answer to ``action`` in ``state``, of the start state behind ``key``."""
        after = state.after[action] = _State(answer)
        if key in self._starts:  # else it was dropped while its episode went on
            self._count(key)
        return after

    def _count(self, key: Hashable) -> None:
        self._sizes[key] = self._sizes.get(key, 0) + 1
        self._total += 1
        while self._total > self.max_transitions and len(self._starts) > 1:
            dropped, _ = self._starts.popitem(last=False)
            self._total -= self._sizes.pop(dropped)


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
        self._behind: list[str] = []  # actions that the environment has not seen yet
        self._unopened: tuple[int | None, Mapping[str, Any]] | None = None  # a reset not seen yet

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> Reset:
        """Start ``options["task_id"]``, from memory where it is known."""
        given = dict(options or {})
        self._key = tuple(sorted(given.items()))
        self._state = self._store.start(self._key)
        self._behind = []
        if self._state is None:
            self._unopened = None
            observation, info = self._env.reset(seed=seed, options=given)
            self._store.misses += 1
            self._state = self._store.add_start(self._key, (observation, 0.0, False, False, info))
        else:
            self._unopened = (seed, given)
            self._store.hits += 1
        observation, _, _, _, info = self._state.answer
        return observation, dict(info)

    def step(self, action: str) -> Step:
        """The answer to ``action``, from memory where it is known."""
        if self._state is None:
            raise RuntimeError("step before reset: call reset(options={'task_id': ...}) first")
        known = self._state.after.get(action)
        if known is None:
            self._catch_up()
            answer = self._env.step(action)
            self._store.misses += 1
            if answer[-1].get("infra_error"):
                known = _State(answer)  # not remembered: it may work the next time
            else:
                known = self._store.add(self._key, self._state, action, answer)
        else:
            self._behind.append(action)
            self._store.hits += 1
        self._state = known
        observation, reward, terminated, truncated, info = known.answer
        return observation, reward, terminated, truncated, dict(info)

    def _catch_up(self) -> None:
        """Bring the environment to the state that memory has led to."""
        if self._unopened is not None:
            seed, options = self._unopened
            self._env.reset(seed=seed, options=options)
            self._unopened = None
        while self._behind:
            self._env.step(self._behind.pop(0))

    def close(self) -> None:
        """Close the environment; the store stays."""
        self._env.close()
