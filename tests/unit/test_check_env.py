import itertools

import pytest
from toy_text_env import ToyEnv

from aem_lightning.envs import EnvContractError, check_env
from aem_lightning.types import Task

TASKS = [Task("one"), Task("two")]


class Plain(ToyEnv):
    """The toy without what differs between its copies."""

    def _info(self, *, valid):
        info = super()._info(valid=valid)
        return {key: info[key] for key in ("task_id", "admissible_actions", "is_action_valid")}


class Forgetful(Plain):
    counter = itertools.count()

    def _observation(self):
        return f"{super()._observation()} {next(self.counter)}"


class Deaf(Plain):
    def _info(self, *, valid):
        return super()._info(valid=True)


class Choosy(Plain):
    def _info(self, *, valid):
        return super()._info(valid=False)


class Gymless(Plain):
    def step(self, action):
        return super().step(action)[:4]


class Wordless(Plain):
    def reset(self, *, seed=None, options=None):
        return 7, super().reset(seed=seed, options=options)[1]


class Fragile(Plain):
    """Does not come back after an exception."""

    broken = False

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed, options=options)
        return ("broken" if self.broken else observation), info

    def step(self, action):
        if not isinstance(action, str):
            self.broken = True
            raise TypeError(action)
        return super().step(action)


class Sticky(Plain):
    """Does not start over in the middle of an episode."""

    trace = ()

    def reset(self, *, seed=None, options=None):
        if self.trace and self.trace[0] == options["task_id"]:
            return self._observation(), self._info(valid=True)
        return super().reset(seed=seed, options=options)


class Misnamed(Plain):
    def _info(self, *, valid):
        return super()._info(valid=valid) | {"task_id": "another"}


class NoDoor(Plain):
    def close(self):
        if getattr(self, "closed", False):
            raise RuntimeError("closed already")
        super().close()


def test_sound_environment_passes():
    check_env(Plain, TASKS)


@pytest.mark.parametrize(
    ("make_env", "message"),
    [
        (Forgetful, r"reset\(\) of a second copy returned .* expected, as the first time"),
        (Deaf, r"step\('xyzzy the quux'\) returned info\['is_action_valid'\]=True; expected False"),
        (Choosy, r"returned info\['is_action_valid'\]=False; expected True"),
        (Gymless, r"expected a tuple \(observation, reward, terminated, truncated, info\)"),
        (Wordless, r"reset returned observation=7; expected str"),
        (Fragile, r"reset\(\) after an exception returned \('broken'"),
        (Sticky, r"reset\(\) in the middle of an episode returned"),
        (Misnamed, r"info\['task_id'\]='another'; expected 'one'"),
        (NoDoor, r"close\(\) raised RuntimeError: closed already"),
        (lambda: Plain(), r"cannot be pickled"),
    ],
)
def test_breach_is_told_with_the_method_what_it_returned_and_what_was_expected(make_env, message):
    with pytest.raises(EnvContractError, match=message):
        check_env(make_env, TASKS)


def test_all_breaches_are_told_at_once():
    with pytest.raises(EnvContractError) as raised:
        check_env(Wordless, [*TASKS, Task("one")])
    assert "more than once: ['one']" in str(raised.value)
    assert str(raised.value).count("expected str") == 3


def test_no_tasks_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        check_env(Plain, [])
