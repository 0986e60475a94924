import importlib
import itertools
import re
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import pytest
from broken_envs import (
    Alike,
    Bound,
    Choosy,
    Deaf,
    Ending,
    Endless,
    Forgetful,
    Fragile,
    Gymless,
    Halfway,
    Misnamed,
    Mute,
    NoDoor,
    Opener,
    Paying,
    Plain,
    Remembering,
    Spawner,
    Sticky,
    Stuck,
    Swallower,
    Torn,
    Untold,
    Wordless,
    the_only_one,
)
from toy_text_env import fail_to_make

from aem_lightning.envs import EnvContractError, check_env
from aem_lightning.envs.leaks import find_leaks
from aem_lightning.envs.trial import excerpts
from aem_lightning.rollout import Prompt, RewardShaping
from aem_lightning.types import Task

TASKS = [Task("one"), Task("two")]


class Data:
    """The part of a DataModule that check_env asks for."""

    train_split, evaluation_splits = "train", ("test",)

    def __init__(self, make_env=Plain, train=("a", "b"), test=("c", "d")):
        self.make_env, self.ids = make_env, {"train": train, "test": test}

    def tasks(self, split):
        ids = self.ids[split]
        return [Task(i, "", split) for i in (next(ids) if hasattr(ids, "send") else ids)]

    def env_factory(self):
        return self.make_env


def other_every_time():
    for number in itertools.count():
        yield (f"{number}", f"{number + 1}")


PLAIN_WORDS = Prompt(opening="", turn="", window="", action="plain")
TAGS = Prompt(opening="", turn="", window="", demonstration="<action>{action}</action>")


def test_sound_environment_passes():
    proved = check_env(Plain, TASKS, resets=0, seed=3)
    assert proved[0].startswith(f"{len(TASKS)} tasks tried, up to 8 turns each: under seed 3")
    assert not any(line.startswith("tasks:") or "leave nothing" in line for line in proved)


@pytest.mark.parametrize("prompt", [PLAIN_WORDS, TAGS])
def test_sound_data_passes(prompt):
    check_env(Data(), prompt=prompt)


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
        (fail_to_make, r"make_env\(\) raised LookupError: the toy box is empty; expected: an env"),
        (Mute, r"make_env\(\) returned .*Mute.* without step, close; expected: an object with"),
        (the_only_one, r"make_env\(\) returned one object twice; expected: a new one each time"),
        (Endless, r"step\('.*'\) returned reward=nan; expected a finite number"),
        (Halfway, r"reset returned info\['won'\]=0.5; expected bool"),
        (
            Torn,
            r"reset returned observation='half of \\ud83d' .*; expected text without half a surr",
        ),
        (Ending, r"step\('.*'\) gave no answer: .*exit status 3; expected: one. Nothing was tried"),
        (Swallower, r"step\(''\) returned info\['is_action_valid'\]=True; expected False"),
        (
            Alike,
            r"'task_id': 'two'.* returned the start of task 'one', .*; expected: another start",
        ),
        (Bound, r"after a crash of the worker process gave infra_error=.* expected: the episode"),
        (
            Opener,
            r"reset\(\) left 300 more open files behind in 300 episodes .* expected: no",
        ),
        (Spawner, r"reset\(\) left 300 more threads behind"),
        (Remembering, r"reset\(\) left \d+ more blocks of memory behind"),
    ],
)
def test_breach_is_told_with_the_method_what_it_returned_and_what_was_expected(make_env, message):
    with pytest.raises(EnvContractError, match=message):
        check_env(make_env, TASKS)


def test_a_call_that_hangs_ends_the_check_with_its_name(caplog):
    data = Data(Stuck)
    data.timeout_s = 1.0
    with pytest.raises(
        EnvContractError, match=r"step\('.*'\) gave no answer: .*within 1 s"
    ) as raised:
        check_env(data)
    assert str(raised.value).startswith("1 breaches")
    assert not caplog.records


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            Data(test=("b", "c")),
            r"tasks\('test'\) returned 1 tasks of tasks\('train'\), e.g. \['b'\]",
        ),
        (Data(test=()), r"tasks\('test'\) returned \[\]; expected at least one task"),
        (Data(train=("a", "a")), r"tasks\('train'\): task ids given more than once: \['a'\]"),
        (Data(train=other_every_time()), r"tasks\('train'\) returned other tasks the second time"),
    ],
)
def test_a_breach_of_the_splits_is_told(data, message):
    with pytest.raises(EnvContractError, match=message):
        check_env(data, resets=0)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            replace(TAGS, demonstration="{action}"),
            r"parse\('xyzzy the quux'\) returned None; expected 'xyzzy .* inadmissible, not malf",
        ),
        (
            replace(PLAIN_WORDS, demonstration="I say {action}"),
            r"parse\('I say look'\) returned 'I say look'; expected 'look', which is admissible",
        ),
        (
            SimpleNamespace(demonstration="{action}", parse=str),
            r"prompt.parse\(''\) returned ''; expected None, .* without an action is malformed",
        ),
    ],
)
def test_a_prompt_that_blurs_malformed_and_inadmissible_is_told(prompt, message):
    with pytest.raises(EnvContractError, match=message):
        check_env(Plain, TASKS, prompt=prompt)


def test_free_text_needs_no_visible_difference_between_tasks():
    """Without a list of actions a hidden difference cannot be found by trying."""
    check_env(partial(Untold, "/nonexistent"), TASKS)


def test_all_breaches_are_told_at_once():
    with pytest.raises(EnvContractError) as raised:
        check_env(Wordless, [*TASKS, Task("one")])
    assert "more than once: ['one']" in str(raised.value)
    assert str(raised.value).count("expected str") == 3


def test_no_tasks_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        check_env(Plain, [])


def test_a_long_state_is_shown_where_it_differs():
    one, other = (f"{'same ' * 200}{word}{' end' * 200}" for word in ("left", "right"))
    shown = excerpts(one, other)
    assert [len(text) for text in shown] == [306, 306]
    assert ["left" in shown[0], "right" in shown[1]] == [True, True]
    assert excerpts("short", "shore") == ["short", "shore"]


class Growing(Plain):
    """Keeps more and more for a while, as a cache does, and then no more."""

    kept: ClassVar[list[bytes]] = []

    def reset(self, *, seed=None, options=None):
        if len(self.kept) < 150:
            self.kept.append(bytes(100))
        return super().reset(seed=seed, options=options)


def test_a_cache_that_fills_up_is_no_leak():
    assert not find_leaks(Growing(), TASKS, seed=0, resets=200)


def test_few_resets_show_open_files_but_do_not_take_the_interpreters_noise_for_a_leak():
    env = Opener()
    leaks = find_leaks(env, TASKS, seed=0, resets=8)
    env.close()
    assert ["open files" in leak for leak in leaks] == [True]
    assert not find_leaks(Remembering(), TASKS, seed=0, resets=8)


@pytest.mark.parametrize(
    ("growth", "leaks"),
    [
        ((67, 5, 9, 8), 0),
        ((164, 60, 52, 70, 20, 7, 30), 0),
        ((67, 60, 52) * 3, 1),
        ((40, 195, 139, 100, 101, 49, 83, 91, 108), 1),
    ],
)
def test_only_memory_that_grows_again_and_again_is_a_leak(growth, leaks):
    blocks = itertools.accumulate(growth, initial=65_000)
    counts = ({"open files": 5, "threads": 2, "blocks of memory": n} for n in blocks)
    found = find_leaks(Plain(), TASKS, seed=0, resets=200, count=lambda: next(counts))
    assert len(found) == leaks


HOME = """
from broken_envs import Plain
{top}

class Env(Plain):
    def reset(self, **how):
        {late}
        return super().reset(**how)
"""


@pytest.mark.parametrize(
    ("top", "late", "line"),
    [
        ("import torch", "pass", r"home\.py:3: import torch\n"),
        ("import second", "pass", r"second\.py:1: import torch\n"),
        ("pass", "import torch", r"home\.py:7: import torch\n"),
        ("import importlib.util", "importlib.util.find_spec('torch')", None),
    ],
    ids=["at the top", "by a second module of its own", "in reset", "only looked for"],
)
def test_the_line_that_loads_torch_into_every_worker_is_named_and_no_other(
    top, late, line, tmp_path, monkeypatch, caplog
):
    for name in ("home", "second"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "torch.py").write_text(
        ""
    )  # of this process the real one, which costs a worker 10 s
    (tmp_path / "second.py").write_text("import torch\n")
    (tmp_path / "home.py").write_text(HOME.format(top=top, late=late))
    monkeypatch.syspath_prepend(tmp_path)
    check_env(importlib.import_module("home").Env, TASKS, resets=0)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == (line is not None)  # and not that the worker was killed
    assert line is None or re.search(line, warnings[-1])


PASSTHROUGH = {"success": 0.0, "environment": 1.0}


@pytest.mark.parametrize(
    ("reward", "wins", "shaping", "told"),
    [
        (0.25, False, {}, r"rewards, e\.g\. 0\.25, and nothing of them is used: type rewards=pass"),
        (0.25, False, PASSTHROUGH, None),
        (0.25, True, {}, r"rewards, e\.g\. 0\.25, and nothing of them is used"),
        (0.25, True, PASSTHROUGH, None),
        (0.0, True, {}, None),
        (0.0, True, PASSTHROUGH, r"a win earns nothing: type rewards=success_only"),
        (0.0, False, {}, None),
    ],
)
def test_rewards_and_wins_of_which_nothing_is_used_are_warned_of(
    reward, wins, shaping, told, caplog
):
    check_env(partial(Paying, reward, wins), TASKS, rewards=RewardShaping(**shaping), resets=0)
    said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(said) == (told is not None)
    assert told is None or re.search(told, said[0])
