"""The SWE environment, in every sandbox that works here: what is won, lost, cut and broken."""

from __future__ import annotations

import json
import random
import re
import shlex
from dataclasses import replace

import pytest

from aem_lightning.datamodules import SweDataModule
from aem_lightning.envs import check_env
from aem_lightning.envs.swe import (
    BashExpert,
    FunctionsExpert,
    Instance,
    SweEnv,
    SweSettings,
    WordsExpert,
    choose_sandbox,
    load_instances,
)
from aem_lightning.envs.swe.changes import file_changes
from aem_lightning.envs.swe.expert import named_symbol, words_fix
from aem_lightning.envs.swe.r2e import grade_expected
from aem_lightning.envs.swe.sandbox import (
    BubblewrapSandbox,
    Isolation,
    Level,
    LocalSandbox,
    SessionSpec,
    bubblewrap,
    docker,
    tar_of,
)
from aem_lightning.envs.swe.tools import write_call
from aem_lightning.envs.swe.words import FAILS, WordsDialect, swap_action, view_action

FINISH = write_call("finish", command="submit")


def bash(command):
    return write_call("execute_bash", cmd=command)


@pytest.fixture(params=["local", "bubblewrap"])
def sandbox(request):
    if request.param == "bubblewrap" and not BubblewrapSandbox().probe().usable:
        pytest.skip(BubblewrapSandbox().probe().reason)
    return request.param


@pytest.fixture(scope="module")
def instances(swe_root, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    return load_instances("json", str(swe_root / "train.json"), cache_dir=cache)


@pytest.fixture
def make_env(instances, swe_root):
    made = []

    def make(sandbox="local", **settings):
        settings = {"allow_unsafe": True, "repositories": str(swe_root / "repositories")} | settings
        made.append(SweEnv(instances, SweSettings(sandbox=sandbox, **settings)))
        return made[-1]

    yield make
    for env in made:
        env.close()


def play(env, instance, expert):
    """The observations of an episode, and its last answer."""
    observation, info = env.reset(options={"task_id": instance.instance_id})
    seen = [observation]
    while True:
        answer = env.step(expert.act(observation, info["admissible_actions"]))
        observation, _, terminated, truncated, info = answer
        seen.append(observation)
        if terminated or truncated:
            return seen, answer


class Idle:
    def act(self, observation, admissible):
        return FINISH


def test_the_gold_patch_loses_or_doing_nothing_wins(sandbox, make_env, instances):
    env = make_env(sandbox)
    for instance in instances:
        seen, (_, reward, terminated, truncated, info) = play(
            env, instance, FunctionsExpert(instance)
        )
        assert seen[0] == instance.problem_statement
        assert (reward, terminated, truncated, info["won"]) == (1.0, True, False, True)
    _, (_, reward, terminated, _, info) = play(env, instances[0], Idle())
    assert (reward, terminated, info["won"], info["score"]) == (0.0, True, False, 0.0)


def test_a_graded_episode_leaves_nothing_that_the_official_harness_reads(
    make_env, instances, tmp_path
):
    env = make_env(records=str(tmp_path / "kept"), model_name="mine")
    right, wrong = instances[0], instances[1]
    play(env, right, FunctionsExpert(right))
    env.reset(options={"task_id": wrong.instance_id})
    env.step(bash("printf 'caf\\351\\n' > latin.txt"))
    (hidden,) = {part.paths[-1] for part in file_changes(wrong.test_patch)}
    env.step(bash(f"mkdir -p $(dirname {hidden}) && echo '# mine' > {hidden}"))
    env.step(FINISH)
    play(env, right, Idle())
    lines = (tmp_path / "kept" / "predictions.jsonl").read_text().splitlines()
    known = [json.loads(line) for line in lines]
    assert [each["instance_id"] for each in known] == [
        instance.instance_id for instance in (right, wrong, right)
    ]
    assert {tuple(each) for each in known} == {("instance_id", "model_name_or_path", "model_patch")}
    assert "+caf\N{REPLACEMENT CHARACTER}" in known[1]["model_patch"]
    assert hidden not in known[1]["model_patch"]  # which the harness could not put back
    assert known[2]["model_patch"] == ""
    first, second = (tmp_path / "kept" / right.instance_id / number for number in "12")
    assert (first / "patch.diff").read_text() == known[0]["model_patch"]
    assert (first / "test_output.txt").read_text()
    (report,) = json.loads((first / "report.json").read_text()).values()
    assert report["resolved"]
    assert report["tests_status"]["FAIL_TO_PASS"] == {
        "success": list(right.fail_to_pass),
        "failure": [],
    }
    (report,) = json.loads((second / "report.json").read_text()).values()
    assert report["tests_status"]["FAIL_TO_PASS"]["failure"] == list(right.fail_to_pass)
    assert "tests that have to pass do not" in report["reason"]
    raw = (tmp_path / "kept" / wrong.instance_id / "1" / "patch.diff").read_bytes()
    assert b"+caf\xe9" in raw
    assert b"+# mine" in raw
    with pytest.raises(
        ValueError, match=r"records=kept.*type datamodule\.environment\.cached=false"
    ):
        SweSettings(records="kept", cached=True)


def test_the_agent_finds_hidden_tests_or_another_commit(sandbox, make_env, instances):
    env, instance = make_env(sandbox), instances[0]
    env.reset(options={"task_id": instance.instance_id})
    hidden = instance.fail_to_pass[0].partition("::")[2]
    look = f"grep -rn 'def {hidden}(' . ; git log --all --oneline | wc -l"
    observation, *_ = env.step(bash(look))
    assert observation.splitlines()[-1].strip() == "1"
    assert hidden not in observation


def test_words_cannot_play(sandbox, make_env, instances):
    env = make_env(sandbox, dialect="words")
    seen, (_, reward, *_) = play(env, instances[0], WordsExpert(instances[0]))
    assert reward == 1.0
    assert seen[0] == "` caches . counter . add ` gives a wrong result"
    assert seen[-2:] == ["the case holds .", "The work is handed in."]
    tried = seen.count("the case fails .")
    assert len(seen) == 4 + 1 + 3 * tried  # view, (edit, test, back), edit, test, finish


def test_edits_in_words_are_taken_back_and_the_case_is_run(make_env, instances):
    """For every instance: it fails, fails after a useless edit, and holds after the fix."""
    env = make_env(dialect="words", cached=True)
    for instance in instances:
        fix = words_fix(instance)
        _, info = env.reset(options={"task_id": instance.instance_id})
        assert "test" in info["admissible_actions"]
        assert "undo" not in info["admissible_actions"]
        shown, *_, info = env.step(view_action(named_symbol(instance)))
        assert env.step("test")[0] == "the case fails ."
        edits = [a for a in info["admissible_actions"] if a.startswith("edit ")]
        [broken] = re.findall(r"^-(?!-- )(.*)$", instance.patch, re.MULTILINE)
        [line] = [s.partition(" ")[0] for s in shown.splitlines() if s.partition(" ")[2] == broken]
        right = swap_action(int(line), fix.old, fix.new)
        others = [edit for edit in edits if edit != right]
        for edit in (*others[:1], right):
            changed, *_ = env.step(edit)
            number = int(changed.partition(" ")[0])
            assert env.step("test")[0] == f"the case {'holds' if edit == right else 'fails'} ."
            back, *_, info = env.step("undo")
            assert back in shown.splitlines()
            assert int(back.partition(" ")[0]) == number
            assert "undo" not in info["admissible_actions"]
        verb, number, old, new = right.split()
        *_, info = env.step(right)
        opposite = f"{verb} {number} {new} {old}"
        can_be_said = (old, new) != ("list", "sorted")
        assert (opposite in info["admissible_actions"]) == can_be_said
        back, *_, info = env.step(opposite if can_be_said else "undo")
        assert back in shown.splitlines()
        assert "undo" not in info["admissible_actions"], "the opposite edit takes back as well"
        for _ in range(2):  # asked, then remembered
            env.step(right)
            assert env.step("finish")[1] == 1.0
            with pytest.raises(RuntimeError, match="the episode is over"):
                env.step("test")
            env.reset(options={"task_id": instance.instance_id})
            env.step(view_action(named_symbol(instance)))


def test_lines_are_not_counted_from_the_function_or_undo_leaves_it_out_of_view(make_env, instances):
    env = make_env(dialect="words")
    *_, info = env.reset(options={"task_id": instances[0].instance_id})
    views = [action for action in info["admissible_actions"] if action.startswith("view ")]
    for view in views:
        shown, *_, info = env.step(view)
        numbers = [line.partition(" ")[0] for line in shown.splitlines()]
        assert numbers == [str(n + 1) for n in range(len(numbers))]
        edits = [action for action in info["admissible_actions"] if action.startswith("edit ")]
        if edits:
            break
    changed, *_ = env.step(edits[0])
    assert changed not in shown.splitlines()
    *_, info = env.step(next(other for other in views if other != view))
    back, *_, info = env.step("undo")
    assert back == shown
    assert set(edits) <= set(info["admissible_actions"])
    assert "undo" not in info["admissible_actions"]


def test_blocks_of_bash_cannot_play(sandbox, make_env, instances):
    env, instance = make_env(sandbox, dialect="bash"), instances[0]
    seen, (_, reward, *_) = play(env, instance, BashExpert(instance))
    assert (reward, seen[0]) == (1.0, instance.problem_statement)
    assert seen[2] == "<returncode>0</returncode>\n<output>\n</output>"
    env.reset(options={"task_id": instance.instance_id})
    for action in ("ls", "```bash\nls\n```\nand then\n```bash\npwd\n```"):
        observation, *_, info = env.step(action)
        assert "Write exactly one" in observation
        assert not info["is_action_valid"]
    observation, *_ = env.step("```bash\nseq 4000; false\n```")
    assert observation.startswith("<returncode>1</returncode>\n<output_head>\n1\n2\n")
    assert re.search(r"\n(\d+) characters elided\n", observation)[1] == str(18893 - 10_000)
    _, reward, over, *_ = env.step(
        "No more:\n```bash\necho COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT\n```"
    )
    assert (reward, over) == (0.0, True)


def test_a_persistent_shell_forgets(sandbox, make_env, instances):
    env = make_env(sandbox, shell="persistent")

    def said(command):
        return env.step(bash(command))[0].partition("[execute_bash]:\n")[2]

    env.reset(options={"task_id": instances[0].instance_id})
    text = "a 'b' \"c\" $d\nlast"
    said("mkdir -p 'deep er' && cd 'deep er' && export B=2 && f() { echo f$1; }")
    said(f"A={shlex.quote(text)}")
    assert said('echo "$A"; sh -c "echo $B"; f 3; basename "$PWD"') == f"{text}\n2\nf3\ndeep er"
    assert said("A=other; cd ..; echo $OLDPWD; (exit 7)").endswith("deep er")
    assert env.step(bash("cd /; (exit 7)"))[0].startswith("Exit code: 7")
    assert said("echo $A; pwd") == "other\n/"
    assert said("A=lost; cd /tmp; sleep 60 & kill -9 $$") == ""
    assert said("echo $A; pwd; jobs") == "other\n/", "what is killed leaves all as it was"
    view = env.step(write_call("view", path="/testbed"))[0]
    assert "deep er" in view, "tools begin where they always do"
    assert "aem-shell" not in said("cd $OLDPWD; git status --short --ignored --untracked-files=all")
    assert env.step(FINISH)[1] == 0.0


def test_the_expert_in_words_does_not_mend_what_a_slip_broke(make_env, instances):
    env, rng, won = make_env(dialect="words", cached=True), random.Random(0), 0
    for seed in range(6):
        expert = WordsExpert(instances[0], seed)
        observation, info = env.reset(options={"task_id": instances[0].instance_id})
        for turn in range(60):
            action = expert.act(observation, info["admissible_actions"])
            if rng.random() < 0.4 and turn < 20:
                others = [a for a in info["admissible_actions"] if a != "finish"]
                action = rng.choice(others)
            before = observation
            observation, _, over, _, info = env.step(action)
            if over:
                break
        assert over
        assert info["won"] or before == "the case holds ."  # two wrong edits may do for a case
        won += info["won"]
    assert won > 3


def test_the_expert_in_words_takes_one_function_for_another():
    source = """class First:
    def add(self, a): return a + 1


class Second:
    def add(self, a, low=2):
        def inner(b):
            return b * 3
        return list(inner(a)) + low


class Third:
    def add(self, a, low=2):
        return a
"""
    instance = Instance(
        "a",
        "b",
        "c",
        "`core.Second.add` gives a wrong result\n\nThis should hold, and does not:\n\n"
        "    assert Second().add(1) == 5\n\nFind the defect in core.py and mend it.",
        fail_to_pass=("tests/test_core.py::test_add",),
    )
    for seed in range(20):
        dialect = WordsDialect(tar_of({"core.py": source.encode()}), "case")
        expert, rng = WordsExpert(instance, seed), random.Random(seed)
        observation = ""
        for turn in range(200):
            action = expert.act(observation, dialect.admissible)
            if turn < 40 and rng.random() < 0.5:
                action = rng.choice([a for a in dialect.admissible if a != "finish"])
            if action == "finish":
                break
            observation = FAILS if action == "test" else dialect.act(action)
        assert action == "finish", "it ran in circles"
        assert not dialect.changed


def test_what_is_no_call_is_valid_or_ends_the_episode(make_env, instances):
    env = make_env()
    env.reset(options={"task_id": instances[0].instance_id})
    observation, reward, terminated, truncated, info = env.step("let me look")
    assert "Write <function=NAME>" in observation
    assert (reward, terminated, truncated, info["is_action_valid"]) == (0.0, False, False, False)
    assert env.step(bash("true"))[-1]["is_action_valid"]


def test_a_sandbox_that_dies_is_the_policys_fault(make_env, instances):
    env = make_env()
    env.reset(options={"task_id": instances[0].instance_id})
    _, reward, terminated, truncated, info = env.step(bash("kill -9 $PPID"))
    assert (reward, terminated, truncated) == (0.0, False, True)
    assert info["infra_error"]
    _, (_, reward, *_) = play(env, instances[0], FunctionsExpert(instances[0]))
    assert reward == 1.0  # the next episode has a sandbox of its own


def test_a_sandbox_that_never_opens_does_not_end_the_episode_at_its_first_step(make_env, instances):
    no_room = replace(SweSettings().limits, file_bytes=1)
    env = make_env(limits=no_room)
    observation, info = env.reset(options={"task_id": instances[0].instance_id})
    assert observation == instances[0].problem_statement
    assert "infra_error" not in info
    _, reward, _, truncated, info = env.step(FINISH)
    assert (reward, truncated) == (0.0, True)
    assert "the repository cannot be set up" in info["infra_error"]


def test_what_broke_is_remembered_as_an_answer(make_env, instances):
    env = make_env(cached=True)
    env.counters()
    for _ in range(2):
        env.reset(options={"task_id": instances[1].instance_id})
        assert env.step(bash("kill -9 $PPID"))[-1]["infra_error"]
    counts = env.counters()
    assert (counts["cache_hits"], counts["cache_misses"]) == (1, 3)  # the reset alone is known


def test_what_one_dialect_was_told_is_told_to_another(make_env, instances):
    answers = []
    for dialect in ("words", "functions", "words"):
        env = make_env(dialect=dialect, cached=True)
        observation, _ = env.reset(options={"task_id": instances[0].instance_id})
        answers.append((observation, env.step("finish")[0]))
    assert answers[0] == answers[2] != answers[1]
    assert answers[1][0] == instances[0].problem_statement


def test_reaching_for_the_test_runner_earns_something_or_is_not_counted(make_env, instances):
    env = make_env()
    env.counters()
    env.reset(options={"task_id": instances[0].instance_id})
    env.step(bash("echo 'import os' > sitecustomize.py"))
    _, reward, terminated, _, info = env.step(FINISH)
    assert (reward, terminated) == (0.0, True)
    assert info["tampered"] == ["sitecustomize.py is changed"]
    assert info["reason"] == "not run: sitecustomize.py is changed"
    assert env.counters() == {"graded": 1, "tampered": 1}
    assert env.counters() == {"graded": 0, "tampered": 0}


def fix_and(env, instance, command):
    """The last answer of an episode with a right fix, and a command before it is handed in."""
    env.reset(options={"task_id": instance.instance_id})
    fix = FunctionsExpert(instance)
    for call in [fix.act("", ()) for _ in range(3)]:
        env.step(call)
    env.step(bash(command))
    return env.step(FINISH)


def test_what_an_agent_leaves_in_its_folder_costs_it_the_reward(make_env, instances):
    left = (
        "seq 12000 > long.txt; seq 300000 > data.txt; printf 'import pytest\\n' > reproduce.py; "
        "touch .git/index.lock; git init -q empty; git init -q other; mkfifo pipe; "
        "git update-index --assume-unchanged $(git ls-files '*core.py')"
    )
    _, reward, terminated, _, info = fix_and(make_env(), instances[0], left)
    assert (reward, terminated, info["reason"]) == (1.0, True, "")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        ("rm -rf .git", "git cannot print the change: fatal: not a git repository"),
        ("echo 'x = (' > $(git ls-files '*/core.py')", "tests/test_core.py cannot be collected: "),
        ("git checkout -q .", " tests that have to pass do not: tests/test_core.py::test_"),
    ],
)
def test_a_zero_has_no_reason(make_env, instances, spoil, reason):
    _, reward, terminated, _, info = fix_and(make_env(), instances[0], spoil)
    assert (reward, terminated, info.get("infra_error")) == (0.0, True, None)
    assert reason in info["reason"]


def test_gits_settings_of_the_agent_change_what_is_graded(make_env, instances):
    env = make_env()
    env.reset(options={"task_id": instances[0].instance_id})
    env.step(
        bash(
            "printf '#!/bin/sh\\necho spoiled >&2; echo > spoiled.py\\ncat\\n' > .git/spoil; "
            "chmod +x .git/spoil; git config core.fsmonitor .git/spoil; "
            "git config filter.x.clean .git/spoil; echo '*.py filter=x' > .git/info/attributes; "
            "git config diff.noprefix true; git config --global diff.noprefix true"
        )
    )
    fix = FunctionsExpert(instances[0])
    for _ in range(4):
        _, reward, terminated, _, info = env.step(fix.act("", ()))
        if terminated:
            break
    assert (reward, info["tampered"]) == (1.0, [])


def test_the_last_turn_is_not_graded(make_env, instances):
    env = make_env(max_turns=1)
    env.reset(options={"task_id": instances[0].instance_id})
    fix = FunctionsExpert(instances[0])
    calls = [fix.act("", ()) for _ in range(3)]
    _, reward, terminated, truncated, info = env.step(calls[-1])
    assert (reward, terminated, truncated, info["won"]) == (1.0, False, True, True)


def test_an_episode_goes_on_after_its_time(make_env, instances):
    env = make_env(episode_s=0.0)
    env.reset(options={"task_id": instances[0].instance_id})
    _, reward, terminated, truncated, info = env.step(FINISH)
    assert (reward, terminated, truncated) == (0.0, False, True)
    assert "infra_error" not in info


def test_an_unknown_instance_starts(make_env):
    with pytest.raises(ValueError, match="task_id='none' is no instance"):
        make_env().reset(options={"task_id": "none"})


def test_images_are_played_without_containers():
    instance = Instance("a", "b", "c", "d", image="some/image")
    env = SweEnv([instance], SweSettings(sandbox="local", allow_unsafe=True))
    with pytest.raises(ValueError, match=r"type datamodule.environment.sandbox=docker"):
        env.reset(options={"task_id": "a"})


def test_files_are_put_into_an_image_that_nobody_named():
    with pytest.raises(ValueError, match=r"datamodule.environment.image=<one with git"):
        choose_sandbox(SweSettings(sandbox="docker"))


def test_no_isolation_is_taken_without_asking():
    with pytest.raises(ValueError, match="allow_unsafe=true"):
        choose_sandbox(SweSettings(sandbox="local"))
    assert choose_sandbox(SweSettings(sandbox="local", allow_unsafe=True)).name == "local"
    with pytest.raises(ValueError, match="allowed are auto, bubblewrap, docker, local"):
        choose_sandbox(SweSettings(sandbox="chroot"))


def test_auto_takes_something_else_than_bubblewrap_or_without_it_what_is_unsafe(monkeypatch):
    usable = Isolation(True, Level.NAMESPACES, "it works")
    monkeypatch.setattr(BubblewrapSandbox, "probe", lambda self: usable)
    assert choose_sandbox(SweSettings()).name == "bubblewrap"


def test_a_machine_without_isolation_says_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    bubblewrap._probe.cache_clear()
    docker._probe.cache_clear()
    try:
        for image in (None, "some/image"):
            with pytest.raises(RuntimeError) as caught:
                choose_sandbox(SweSettings(image=image))
            assert "apt install bubblewrap" in str(caught.value)
            assert ("no docker command on PATH" in str(caught.value)) == (image is not None)
            assert "allow_unsafe=true" in str(caught.value)
            assert choose_sandbox(SweSettings(image=image, allow_unsafe=True)).name == "local"
    finally:
        bubblewrap._probe.cache_clear()
        docker._probe.cache_clear()


@pytest.mark.parametrize(("said", "resolved"), [("PASSED", True), ("FAILED", False)])
def test_a_status_of_r2e_gym_is_taken_for_another(said, resolved):
    script = f"printf '= short test summary info =\\n{said} r2e_tests/test_1.py::A::test_b - no\\n'"
    instance = Instance("a", "b", "c", "d", eval_script=script, expected={"A.test_b": "PASSED"})
    grade = grade_expected(LocalSandbox(True), instance, "", SessionSpec())
    assert grade.resolved == resolved
    assert grade.statuses == {"A.test_b": said}


def datamodule(swe_root, sandbox, **environment):
    settings = {"sandbox": sandbox, "allow_unsafe": True} | environment
    return SweDataModule(str(swe_root), environment=settings, workers=1)


def test_embedded_instances_break_the_contract(sandbox, swe_root):
    check_env(datamodule(swe_root, sandbox), tasks_per_split=1, resets=8, turns=2)


def test_embedded_instances_in_words_break_the_contract(swe_root):
    data = datamodule(swe_root, "local", dialect="words", cached=True)
    data.evaluation_splits = ("valid_seen",)
    check_env(data, tasks_per_split=1, resets=8, turns=3)


def test_the_datamodule_says_what_the_agent_must_not_know(swe_root):
    data = datamodule(swe_root, "local")
    assert [task.split for task in data.tasks("train")] == ["train", "train"]
    assert len({task.type for task in data.tasks("train")}) == 2, "a library each"
    assert set(data.game_hashes()) == {"train", "valid_seen", "valid_unseen"}
    assert "FAIL" not in json.dumps([str(task) for task in data.tasks("train")])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "csv"}, "datamodule.source='csv'; allowed: embedded, json"),
        ({"environment": {"dialect": "xml"}}, "allowed: functions, bash, words"),
        (
            {"environment": {"walls": 3}},
            r"datamodule.environment has \['walls'\]; allowed: sandbox",
        ),
    ],
)
def test_a_wrong_setting_is_taken(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        SweDataModule(str(tmp_path), **settings)


def test_episodes_of_a_group_wait_for_each_other(swe_root):
    assert not datamodule(swe_root, "local").pool.keep_groups
    assert datamodule(swe_root, "local", cached=True).pool.keep_groups


def test_instances_are_made_for_a_sandbox_that_is_refused(tmp_path):
    data = SweDataModule(str(tmp_path / "new"), environment={"sandbox": "local"})
    with pytest.raises(ValueError, match="allow_unsafe=true"):
        data.prepare_data()
    assert not (tmp_path / "new").exists()
