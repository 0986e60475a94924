"""A repository with a bug as a `TextEnv`: the agent works in a sandbox, hidden tests decide."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from aem_lightning.envs.base import Reset, Step, TextEnv
from aem_lightning.envs.swe.bash import describe_output, hands_in, parse_block
from aem_lightning.envs.swe.grading import Grade, grade
from aem_lightning.envs.swe.instances import Instance
from aem_lightning.envs.swe.official import OUTPUT_BYTES, grade_official, is_official
from aem_lightning.envs.swe.r2e import HIDE_TESTS, grade_expected
from aem_lightning.envs.swe.records import keep_record
from aem_lightning.envs.swe.repositories import Repositories
from aem_lightning.envs.swe.sandbox import (
    WORKDIR,
    CommandResult,
    Limits,
    Sandbox,
    Session,
    SessionSpec,
    tar_of,
)
from aem_lightning.envs.swe.settings import SweSettings, choose_sandbox, session_spec
from aem_lightning.envs.swe.tools import Call, CallError, describe, parse_call, run_call
from aem_lightning.envs.swe.words import (
    FAILS,
    FINISH,
    HOLDS,
    TEST,
    WordsDialect,
    case_command,
    spoken,
)
from aem_lightning.envs.swe.worktree import (
    SETUP_WALL_S,
    Change,
    apply,
    commit_base,
    read_change,
)
from aem_lightning.envs.transition_cache import TransitionCache, shared_store


class SweEnv:
    """An instance in a sandbox of its own; ``reset(options={"task_id": instance_id})`` opens one.

    The first observation is the problem statement. Actions are calls of tools; ``finish`` has the
    change graded, in another sandbox, and ends the episode with reward 1.0 where it resolves the
    instance, else 0.0. ``info`` has all reserved keys; ``reason`` says why a reward is 0, and
    ``tampered`` what in the change reached for the test runner. A sandbox that breaks ends the
    episode as truncated, with ``infra_error``.
    The seed changes nothing.

    Raises:
        RuntimeError: No sandbox works here.
    """

    def __init__(self, instances: Iterable[Instance], settings: SweSettings | None = None) -> None:
        settings = settings or SweSettings()
        self._env: TextEnv = _Engine({i.instance_id: i for i in instances}, settings)
        if settings.cached:
            self._env = TransitionCache(self._env, shared_store("swe", repr(settings)))

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> Reset:
        """Start the instance ``options["task_id"]``.

        Raises:
            ValueError: No task id was given, or one that is unknown.
        """
        if not options or "task_id" not in options:
            raise ValueError(f"reset(options={options!r}): give options={{'task_id': instance_id}}")
        return self._env.reset(seed=seed, options={"task_id": options["task_id"]})

    def step(self, action: str) -> Step:
        """Do what ``action`` says; one that is no call is answered with how to write it."""
        return self._env.step(action)

    def counters(self) -> dict[str, int]:
        """What all environments of this process did since last asked."""
        counts = {name: _COUNTS[name] for name in ("graded", "tampered")}
        _COUNTS.clear()
        return counts | (self._env.counters() if isinstance(self._env, TransitionCache) else {})

    def close(self) -> None:
        """End the session."""
        self._env.close()


def grade_change(
    sandbox: Sandbox, settings: SweSettings, instance: Instance, files: bytes, diff: str
) -> Grade:
    """Grade a change the way that the instance's data set is graded.

    Args:
        sandbox: Where.
        settings: The limits.
        instance: What the change is for.
        files: Archive of the base tree; empty for an image.
        diff: The change.
    """
    limits = settings.limits.ended_by_the_clock(settings.grade_s)
    spec = session_spec(settings, instance, replace(limits, output_bytes=OUTPUT_BYTES))
    if instance.expected:
        return grade_expected(sandbox, instance, diff, spec)
    if is_official(instance):
        return grade_official(sandbox, instance, diff, spec)
    return grade(sandbox, instance, files, diff, spec)


_COUNTS: Counter[str] = Counter()


class _Engine:
    """One session after the other."""

    def __init__(self, instances: Mapping[str, Instance], settings: SweSettings) -> None:
        self._settings = settings
        self._repositories = Repositories(settings.repositories)
        self._instances = {i: self._repositories.located(instances[i]) for i in instances}
        self._session: Session | None = None
        self._is_over = True

    @cached_property
    def _sandbox(self) -> Sandbox:
        has_images = any(instance.image for instance in self._instances.values())
        return choose_sandbox(self._settings, has_images=has_images)

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> Reset:
        self._end_session()
        task_id = str((options or {})["task_id"])
        if task_id not in self._instances:
            known = ", ".join(sorted(self._instances)[:3])
            raise ValueError(f"task_id={task_id!r} is no instance of this data set ({known}, ...)")
        self._instance = self._instances[task_id]
        self._files = self._repositories.base(self._instance)
        self._turns, self._start = 0, time.monotonic()
        self._words: WordsDialect | None = None
        # What the last case came to, and for which change.
        self._told: tuple[Mapping[str, str], CommandResult] | None = None
        self._is_over = False
        self._broken = self._open_words() if self._settings.dialect == "words" else self._open()
        return self._observation(), self._info()

    def _open(self) -> str | None:
        """Open a session with the repository in it; what broke, if something did."""
        self._session = self._sandbox.open(self._spec(self._settings.limits))
        if self._files:
            done = self._session.put_tar(self._files)
        else:
            done = self._set_up_image(self._session)
        if done.code == 0:
            done = commit_base(self._session, ignored_too=bool(self._files))
            self._base = done.output.strip()[-40:]
        if done.code == 0:
            return None
        return _why_not_set_up(done)

    def _open_words(self) -> str | None:
        """Be ready to play in words; a sandbox is opened where code runs."""
        if not self._files:
            return "it is an image; type datamodule.environment.dialect=functions"
        _ = self._sandbox  # where there is none, it is told now
        self._words = WordsDialect(self._files, case_command(self._instance))
        return None

    def _set_up_image(self, session: Session) -> CommandResult:
        """Hide the tests of an image, and give it the bug where it has none."""
        instance = self._instance
        if instance.setup_patch:
            done = apply(session, instance.setup_patch)
            tests = sorted({name.split("::")[0] for name in instance.fail_to_pass})
            return done if done.code else session.run(f"rm -f -- {shlex.join(tests)}")
        link = f"ln -sfn {instance.workdir} {WORKDIR} && " if instance.workdir != WORKDIR else ""
        return session.run(link + HIDE_TESTS, wall_s=SETUP_WALL_S)

    @property
    def state_key(self) -> Hashable:
        """Equal where the rest of two episodes of an instance would be; ``None`` is never equal."""
        if self._is_over or self._words is None or self._settings.max_turns is not None:
            return None
        return self._words.state

    def step(self, action: str) -> Step:
        if self._broken is not None:
            return self._break(self._broken)
        if self._is_over:
            raise RuntimeError("step: the episode is over; call reset(options={'task_id': ...})")
        if time.monotonic() - self._start > self._settings.episode_s:
            self._end_session()
            said = "The time of this episode is up."
            return said, 0.0, False, True, self._info(reason=said)
        self._turns += 1
        if self._words is not None:
            return self._step_in_words(self._words, spoken(action))
        assert self._session is not None
        try:
            call = self._parse(action)
        except CallError as error:
            return self._go_on(str(error), is_valid=False)
        if call.tool == "finish":
            return self._finish("The work is handed in.", terminated=True)
        result = run_call(self._session, call, self._settings.shell)
        if result.infra_error:
            return self._break(result.infra_error)
        if self._settings.dialect == "bash":
            if hands_in(result):
                return self._finish("The work is handed in.", terminated=True)
            return self._go_on(describe_output(result), is_valid=True)
        return self._go_on(describe(call, result), is_valid=True)

    def _step_in_words(self, words: WordsDialect, said: str) -> Step:
        if said == FINISH:
            return self._finish("The work is handed in.", terminated=True)
        if said == TEST and words.case:
            result = self._run_case(words)
            if result.infra_error:
                return self._break(result.infra_error)
            return self._go_on(FAILS if result.code else HOLDS, is_valid=True)
        try:
            return self._go_on(words.act(said), is_valid=True)
        except CallError as error:
            return self._go_on(str(error), is_valid=False)

    def _run_case(self, words: WordsDialect) -> CommandResult:
        """What was reported, run on the tree as it is now, in the episode's sandbox."""
        changed = words.changed
        if self._told is not None and self._told[0] == changed:
            return self._told[1]
        touched = {path: text.encode() for path, text in words.touched.items()}
        archives = [tar_of(touched)] if touched else []
        if self._session is None or not self._session.alive():
            self._close_session()
            self._session = self._sandbox.open(self._spec(self._settings.limits))
            archives = [self._files, *archives]
        for archive in archives:
            done = self._session.put_tar(archive)
            if done.code:
                return replace(done, infra_error=_why_not_set_up(done))
        self._told = changed, self._session.run(words.case)
        return self._told[1]

    def _parse(self, action: str) -> Call:
        return parse_block(action) if self._settings.dialect == "bash" else parse_call(action)

    def close(self) -> None:
        """End the session, and forget the sandbox with what it started ahead."""
        self._end_session()
        self.__dict__.pop("_sandbox", None)

    def _end_session(self) -> None:
        self._is_over = True
        self._close_session()

    def _close_session(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def _go_on(self, observation: str, *, is_valid: bool) -> Step:
        if self._turns == self._settings.max_turns:
            return self._finish(observation, terminated=False, is_valid=is_valid)
        return observation, 0.0, False, False, self._info(is_action_valid=is_valid)

    def _finish(self, observation: str, *, terminated: bool, is_valid: bool = True) -> Step:
        """Grade the change; ``terminated`` by the agent, else cut."""
        grade = self._grade()
        if grade.infra_error:
            return self._break(grade.infra_error)
        self._end_session()
        _COUNTS.update(graded=1, tampered=bool(grade.tampered))
        info = self._info(
            is_action_valid=is_valid,
            won=grade.resolved,
            score=float(grade.resolved),
            tampered=list(grade.tampered),
            reason=grade.reason,
        )
        return observation, float(grade.resolved), terminated, not terminated, info

    def _grade(self) -> Grade:
        if self._words is not None:
            # It is the body of a hidden test, and quicker; but a record has what the tests wrote.
            if self._words.case and self._settings.records is None:
                told = self._run_case(self._words)
                if told.infra_error or told.code:
                    return Grade(infra_error=told.infra_error, why="the reported case fails")
            changed = Change(self._words.diff)
        else:
            assert self._session is not None
            changed = read_change(self._session, self._base)
        if changed.infra_error or changed.problem:
            return Grade(infra_error=changed.infra_error, report=changed.problem)
        found = grade_change(
            self._sandbox, self._settings, self._instance, self._files, changed.diff
        )
        found = replace(found, left_out=changed.left_out + found.left_out)
        if (folder := self._settings.records) is not None and not found.infra_error:
            model = self._settings.model_name
            keep_record(Path(folder), model, self._instance, changed.diff, found)
        return found

    def _spec(self, limits: Limits) -> SessionSpec:
        return session_spec(self._settings, self._instance, limits)

    def _break(self, reason: str) -> Step:
        self._end_session()
        return "", 0.0, False, True, self._info(infra_error=reason)

    def _observation(self) -> str:
        statement = self._instance.problem_statement
        if self._settings.dialect == "words":
            return spoken(statement.strip().partition("\n")[0])  # the title
        return statement

    def _info(self, **more: Any) -> dict[str, Any]:
        info: dict[str, Any] = {
            "task_id": self._instance.instance_id,
            "goal": self._observation(),
            # Calls in XML cannot be listed.
            "admissible_actions": self._words.admissible if self._words else (),
            "is_action_valid": True,
            "won": False,
            "score": 0.0,
        }
        return info | more


def _why_not_set_up(done: CommandResult) -> str:
    return done.infra_error or f"the repository cannot be set up: {done.output.strip()[-500:]}"
