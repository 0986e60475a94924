import random

import pytest
from toy_text_env import ToyEnv

from aem_lightning.envs.transition_cache import TransitionCache, TransitionStore


def _walk(env, task, actions, seed=0):
    told = [env.reset(seed=seed, options={"task_id": task})]
    told += [env.step(action) for action in actions]
    for answer in told:
        answer[-1].pop("env_number")
    return told


def test_answers_equal_the_environments_own_over_random_walks():
    store = TransitionStore()
    cached = [TransitionCache(ToyEnv(), store) for _ in range(2)]
    rng = random.Random(0)
    for number in range(200):
        actions = [rng.choice(("look", "say 1", "win")) for _ in range(rng.randrange(6))]
        task = f"task {rng.randrange(3)}"
        expected = _walk(ToyEnv(), task, actions)
        assert _walk(cached[number % 2], task, actions) == expected
    assert store.hits > store.misses


def test_walk_known_from_another_copy_does_not_touch_the_environment():
    store, inner = TransitionStore(), ToyEnv()
    _walk(TransitionCache(ToyEnv(), store), "task", ["look", "look"])
    _walk(TransitionCache(inner, store), "task", ["look", "look"])
    assert inner.steps_taken == 0


def test_environment_is_brought_up_to_date_when_an_unknown_action_follows_known_ones():
    store, inner = TransitionStore(), ToyEnv()
    _walk(TransitionCache(ToyEnv(), store), "task", ["look", "say 1"])
    told = _walk(TransitionCache(inner, store), "task", ["look", "say 1", "say 2"])
    assert told == _walk(ToyEnv(), "task", ["look", "say 1", "say 2"])
    assert inner.steps_taken == 3


def test_copies_with_different_seeds_share_what_they_were_told():
    cache = TransitionCache(ToyEnv(), TransitionStore())
    assert _walk(cache, "task", [], seed=0) == _walk(cache, "task", [], seed=1)


def test_store_keeps_to_its_bound_and_drops_what_was_used_least_recently():
    store = TransitionStore(max_transitions=10)
    cache, inner = TransitionCache(ToyEnv(), store), ToyEnv()
    for number in range(5):
        _walk(cache, f"task {number}", ["look", "look"])
    assert len(store) <= 10
    _walk(TransitionCache(inner, store), "task 4", ["look", "look"])
    assert inner.steps_taken == 0
    _walk(TransitionCache(inner, store), "task 0", ["look", "look"])
    assert inner.steps_taken == 2


class Switches:
    """Three lamps; what an answer says hangs on which are lit, not on the way there."""

    def reset(self, *, seed=None, options=None):
        self.lit, self.steps = frozenset(), 0
        return "dark", {}

    def step(self, action):
        self.steps += 1
        self.lit ^= {action}
        return f"{action}: {sorted(self.lit)}", 0.0, False, False, {"lit": len(self.lit)}

    @property
    def state_key(self):
        return self.lit

    def close(self):
        pass


def test_ways_that_lead_to_one_state_are_one():
    store = TransitionStore()
    first, second = TransitionCache(Switches(), store), TransitionCache(Switches(), store)
    play = lambda env, actions: [env.reset(options={"task_id": 1}), *map(env.step, actions)]  # noqa: E731
    rng = random.Random(0)
    for number in range(60):
        actions = [rng.choice("abc") for _ in range(12)]
        plain = Switches()
        expected = play(plain, actions)
        assert play((first, second)[number % 2], actions) == expected
    assert len(store) <= 1 + 8 * 3  # the reset, and three switches in each of eight states
    inner = Switches()
    cached = TransitionCache(inner, store)
    play(cached, "abcabcaabbcc")
    assert not hasattr(inner, "steps")
    cached.step("a")
    cached.step("other")  # not known: the environment is told the way without its circles
    assert (inner.steps, inner.lit) == (2, {"a", "other"})
    play(cached, "abba")
    cached.step("unknown")
    assert (inner.steps, inner.lit) == (1, {"unknown"})


def test_counts_are_taken_once():
    store = TransitionStore()
    cache = TransitionCache(ToyEnv(), store)
    for _ in range(3):
        _walk(cache, "task", ["look"])
    assert store.take_counts() == {"cache_hits": 4, "cache_misses": 2}
    assert store.take_counts() == {"cache_hits": 0, "cache_misses": 0}
    assert len(store) == 2


def test_changing_an_answer_does_not_change_what_the_next_copy_gets():
    cache = TransitionCache(ToyEnv(), TransitionStore())
    cache.reset(options={"task_id": "task"})[1]["task_id"] = "spoiled"
    assert cache.reset(options={"task_id": "task"})[1]["task_id"] == "task"


def test_step_before_reset_is_refused():
    with pytest.raises(RuntimeError, match="reset"):
        TransitionCache(ToyEnv(), TransitionStore()).step("look")


class FlakyEnv(ToyEnv):
    """Breaks the first time that it is to say something."""

    broken = False

    def step(self, action):
        if action == "say 1" and not self.broken:
            self.broken = True
            return "", 0.0, False, True, {"infra_error": "gone"}
        return super().step(action)


def test_what_broke_once_is_broken_for_ever():
    cached = TransitionCache(FlakyEnv(), TransitionStore())
    cached.reset(seed=0, options={"task_id": "task"})
    assert cached.step("say 1")[-1]["infra_error"] == "gone"
    cached.reset(seed=0, options={"task_id": "task"})
    assert "infra_error" not in cached.step("say 1")[-1]
