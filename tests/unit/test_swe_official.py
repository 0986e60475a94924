"""SWE-bench's rows that no plain pytest grades: by the real `swebench`, and by a stand-in of it."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from dataclasses import replace
from importlib.util import spec_from_loader
from types import ModuleType

import pytest
from test_grading import change

from aem_lightning.datamodules import SweDataModule
from aem_lightning.envs import MissingExtraError
from aem_lightning.envs.swe import Instance, SweEnv, SweSettings, official
from aem_lightning.envs.swe.official import (
    REPOSITORIES,
    eval_script,
    grade_official,
    is_official,
    load_harness,
    quiet_script,
)
from aem_lightning.envs.swe.patches import make_diff
from aem_lightning.envs.swe.r2e import grade_expected
from aem_lightning.envs.swe.sandbox import Limits, LocalSandbox, SessionSpec, tar_of
from aem_lightning.envs.swe.tools import write_call

BUGGY = "def total(a, b):\n    return a - b\n"
FIXED = BUGGY.replace("-", "+")
OLD_TESTS = """import unittest

from shop.prices import total


class TotalTests(unittest.TestCase):
    def test_zero(self):
        self.assertEqual(total(1, 0), 1)
"""
TESTS = OLD_TESTS + "\n    def test_sum(self):\n        self.assertEqual(total(1, 2), 3)\n"
# Names tests as unittest did when the published data were made, and takes modules as Django's.
RUNNER = """import os
import sys
import unittest

sys.path[:0] = [os.getcwd(), os.path.join(os.getcwd(), "tests")]


class Result(unittest.TextTestResult):
    def getDescription(self, test):
        name = f"{type(test).__module__}.{type(test).__qualname__}"
        return f"{test._testMethodName} ({name})"


if any(map(os.path.exists, ("setup.cfg", "pyproject.toml", "bin/test"))):
    sys.exit("these are the agent's settings")
suite = unittest.defaultTestLoader.loadTestsFromNames(sys.argv[1:])
done = unittest.TextTestRunner(verbosity=2, resultclass=Result).run(suite)
sys.exit(not done.wasSuccessful())
"""
TEST_FILE = "tests/prices/test_total.py"
BASE = {
    "shop/__init__.py": "",
    "shop/prices.py": BUGGY,
    "tests/prices/__init__.py": "",
    TEST_FILE: OLD_TESTS,
    "tests/runtests.py": RUNNER,
}
SUM = "test_sum (prices.test_total.TotalTests)"
ZERO = "test_zero (prices.test_total.TotalTests)"
VERSION = "0.0"
SPEC = {"test_cmd": "python tests/runtests.py"}
INSTANCE = Instance(
    "django__django-1",
    "django/django",
    "HEAD",
    "total(1, 2) is wrong",
    test_patch=make_diff(TEST_FILE, OLD_TESTS, TESTS),
    fail_to_pass=(SUM,),
    pass_to_pass=(ZERO,),
    version=VERSION,
    image="some/image",
)


FIX = make_diff("shop/prices.py", BUGGY, FIXED)
COMMIT = "git init -q . && git add --all && git -c user.name=a -c user.email=a@b commit -qm base"


class Image:
    """A local sandbox whose sessions start as a container of an image does: with the repository."""

    name = "image"

    def __init__(self):
        self.specs = []

    def open(self, spec):
        self.specs.append(spec)
        session = LocalSandbox(True).open(spec)
        session.put_tar(tar_of({path: text.encode() for path, text in BASE.items()}))
        made = session.run(COMMIT)
        assert made.code == 0, made.output
        return session


def stand_in():
    """As much of the package as is used, written for these tests alone."""

    def parse(log, test_spec):
        words = {"ok": "PASSED", "FAIL": "FAILED", "ERROR": "ERROR"}
        found = re.findall(r"^(.+) \.\.\. (ok|FAIL|ERROR)$", log, re.MULTILINE)
        return {name: words[word] for name, word in found}

    def script(row, spec, environment, folder, commit, patch):
        files = re.findall(r"^diff --git a/(\S+)", patch, re.MULTILINE)
        modules = [f.removeprefix("tests/").removesuffix(".py").replace("/", ".") for f in files]
        return [
            f"cd {folder}",
            *spec.get("eval_commands", ()),
            f"git checkout {commit} {' '.join(files)}",
            f"git apply - <<'END_OF_PATCH'\n{patch}\nEND_OF_PATCH",
            ": '>>>>> Start Test Output'",
            " ".join([spec["test_cmd"], *modules]),
            ": '>>>>> End Test Output'",
            f"git checkout {commit} {' '.join(files)}",
        ]

    contents = {
        "swebench": {},
        "swebench.harness": {},
        "swebench.harness.constants": {
            "MAP_REPO_VERSION_TO_SPECS": {"django/django": {"4.2": {"test_cmd": "true"}}}
        },
        "swebench.harness.log_parsers": {"MAP_REPO_TO_PARSER": {"django/django": parse}},
        "swebench.harness.test_spec": {},
        "swebench.harness.test_spec.create_scripts": {"make_eval_script_list": script},
    }
    for name, content in contents.items():
        module = ModuleType(name)
        module.__dict__.update(content, __path__=[])
        yield name, module


@pytest.fixture
def pretended(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "swebench"]:
        monkeypatch.delitem(sys.modules, name)
    for name, module in stand_in():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(params=["pretended", "real"])
def harness(request, monkeypatch):
    """The package, with a version that can be tested on any machine."""
    if request.param == "real":
        pytest.importorskip("swebench")
    else:
        request.getfixturevalue("pretended")
    loaded = load_harness()
    monkeypatch.setitem(loaded.specs["django/django"], VERSION, SPEC)
    return loaded


def graded(diff, instance=INSTANCE, wall_s=60.0):
    return grade_official(Image(), instance, diff, SessionSpec(limits=Limits(wall_s=wall_s)))


@pytest.mark.usefixtures("harness")
def test_a_fix_fails_or_doing_nothing_passes():
    found = graded(FIX)
    assert found.resolved, found.report
    assert found.statuses == {SUM: "PASSED", ZERO: "PASSED"}
    nothing = graded("")
    assert not nothing.resolved
    assert (nothing.statuses[SUM], nothing.statuses[ZERO]) == ("FAILED", "PASSED")


@pytest.mark.usefixtures("harness")
def test_a_change_of_the_tests_or_of_the_runners_settings_is_graded():
    edited = make_diff(TEST_FILE, OLD_TESTS, TESTS.replace("3)", "-1)"))
    runner = make_diff("tests/runtests.py", RUNNER, f"print('{SUM} ... ok')\n")
    for path in ("setup.cfg", "pyproject.toml", "bin/test"):
        runner += change(path, "", "nonsense\n")
    assert graded(FIX + edited + runner).resolved
    assert not graded(edited + runner).resolved


FORGED = f"print('{SUM} ... ok')\nprint('{ZERO} ... ok')\n"


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize("line", ["print('a ... ok')", "print('PASSED a')", "print('test_a ok')"])
def test_a_runners_words_in_the_product_earn_something(line):
    found = graded(make_diff("shop/prices.py", BUGGY, f"{line}\n{FIXED}"))
    assert not found.resolved
    assert found.tampered == (f"shop/prices.py: {line!r}",)


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize(
    ("stream", "end"),
    [
        ("stdout", "print('>>>>> End Test Output')\n"),
        ("stderr", "print('>>>>> End Test Output', file=sys.stderr)\n"),
        ("stdout", "raise SystemExit(1)\n"),
    ],
)
def test_lines_that_the_product_prints_hide_a_failure(stream, end, monkeypatch):
    monkeypatch.setattr(official, "_forgery", lambda change: ())  # the scan is the second wall
    lines = f"import sys\nsys.{stream}.write('{SUM} ... ok\\n{ZERO} ... ok\\n')\n{end}"
    assert not graded(make_diff("shop/prices.py", BUGGY, lines + BUGGY)).resolved


def test_what_is_written_before_the_tests_counts(harness, monkeypatch):
    monkeypatch.setattr(official, "_forgery", lambda change: ())
    install = {"test_cmd": "true", "eval_commands": ["python setup.py"]}
    monkeypatch.setitem(harness.specs["django/django"], VERSION, install)
    found = graded(change("setup.py", "", FORGED))
    assert not found.resolved
    assert found.statuses == {}
    assert found.infra_error is None


@pytest.mark.usefixtures("harness")
def test_a_test_patch_that_does_not_fit_or_is_long_is_the_agents_doing():
    unfit = replace(INSTANCE, test_patch=make_diff(TEST_FILE, TESTS, OLD_TESTS))
    assert "test patch does not apply" in str(graded(FIX, unfit).infra_error)
    long = INSTANCE.test_patch + change("tests/prices/data.txt", "", "1234567\n" * 20_000)
    found = graded(FIX, replace(INSTANCE, test_patch=long))
    assert found.resolved, found


def test_a_missing_runner_is_the_agents_doing_or_its_own_exit_is_not(harness, monkeypatch):
    lost = make_diff("shop/prices.py", BUGGY, "raise SystemExit(127)\n")
    assert graded(lost).infra_error is None
    missing = {"test_cmd": "no_such_runner"}
    monkeypatch.setitem(harness.specs["django/django"], VERSION, missing)
    assert "cannot be run in this image" in str(graded(FIX).infra_error)


@pytest.mark.usefixtures("harness")
def test_an_endless_loop_hangs_the_grader():
    found = graded(make_diff("shop/prices.py", BUGGY, "while True:\n    pass\n"), wall_s=3.0)
    assert "over 3 s" in found.report
    assert (found.resolved, found.infra_error) == (False, None)


def test_a_line_that_is_half_a_result_breaks_the_grader(pretended, monkeypatch):
    def parse(log, test_spec):
        return {log.split()[999]: "PASSED"}

    loaded = load_harness()
    monkeypatch.setitem(loaded.specs["django/django"], VERSION, SPEC)
    monkeypatch.setitem(loaded.parsers, "django/django", parse)
    found = graded(FIX)
    assert (found.resolved, found.statuses, found.infra_error) == (False, {}, None)


def test_the_script_of_a_row_is_not_run(harness):
    script = eval_script(INSTANCE, harness)
    instance = replace(
        INSTANCE, version="", eval_script=f"#!/bin/bash\nset -uxo pipefail\n{script}"
    )
    assert graded(FIX, instance).resolved
    assert not graded("", instance).resolved


@pytest.mark.usefixtures("harness")
def test_an_episode_with_such_an_image_is_graded_by_something_else(monkeypatch):
    image = Image()
    monkeypatch.setattr(
        "aem_lightning.envs.swe.env.choose_sandbox", lambda settings, has_images: image
    )
    limits = Limits(memory_bytes=2 << 30)
    env = SweEnv([INSTANCE], SweSettings(grade_s=60, limits=limits))
    for command, reward in (("sed -i 's/a - b/a + b/' shop/prices.py", 1.0), ("true", 0.0)):
        env.reset(options={"task_id": INSTANCE.instance_id})
        env.step(write_call("execute_bash", cmd=command))
        _, earned, terminated, _, info = env.step(write_call("finish", command="submit"))
        assert (earned, terminated, "infra_error" in info) == (reward, True, False)
    env.close()
    played, tested = (spec.limits for spec in image.specs[-2:])
    assert played == limits
    assert tested == replace(limits, wall_s=60, cpu_s=61, output_bytes=official.OUTPUT_BYTES)


@pytest.mark.parametrize(
    ("changed", "theirs"),
    [
        ({}, True),
        ({"version": ""}, False),
        ({"version": "", "eval_script": "true"}, True),
        ({"image": None}, False),
        ({"repo": "some/repository"}, False),
    ],
)
def test_another_row_is_taken_for_an_image_of_swe_bench(changed, theirs):
    assert is_official(replace(INSTANCE, **changed)) == theirs


# ------------------------------------------------------------------------------- before any work


def datamodule(tmp_path, **columns):
    row = {
        "instance_id": INSTANCE.instance_id,
        "repo": INSTANCE.repo,
        "base_commit": "0" * 40,
        "patch": FIX,
        "test_patch": INSTANCE.test_patch,
        "problem_statement": "It fails.",
        "FAIL_TO_PASS": json.dumps([SUM]),
        "PASS_TO_PASS": json.dumps([ZERO]),
        "version": "4.2",
        "image": "some/image",
    }
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([row | columns]))
    return SweDataModule(str(tmp_path), source="json", splits={"train": str(file)})


@pytest.mark.parametrize("missing", ["constants", "test_spec.create_scripts"])
@pytest.mark.usefixtures("pretended")
def test_a_missing_package_is_not_said_before_any_work(missing, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, f"swebench.harness.{missing}", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'aem-lightning\[swebench\]'"):
        datamodule(tmp_path).tasks("train")


@pytest.mark.usefixtures("pretended")
def test_other_rows_need_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "swebench.harness.constants", None)
    assert len(datamodule(tmp_path, repo="some/repository").tasks("train")) == 1


@pytest.mark.usefixtures("pretended")
def test_a_version_that_nobody_knows_is_not_said_before_any_work(tmp_path):
    assert len(datamodule(tmp_path).tasks("train")) == 1
    with pytest.raises(ValueError, match=r"version '9\.9' of django/django; it has 4\.2"):
        datamodule(tmp_path, version="9.9").tasks("train")


# -------------------------------------------------------------------------------- the real package


def test_the_package_does_not_know_a_repository_or_how_to_test_a_version():
    pytest.importorskip("swebench")
    harness = load_harness()
    for repo in sorted(REPOSITORIES):
        assert repo in harness.parsers
        for version in harness.specs[repo]:
            script = eval_script(replace(INSTANCE, repo=repo, version=version), harness)
            last = quiet_script(script).split("\n")[-1]
            assert "conda activate testbed" in script
            assert last.endswith("prices.test_total" if repo == "django/django" else TEST_FILE)


@pytest.mark.parametrize(
    ("repo", "log", "statuses"),
    [
        (
            "sympy/sympy",
            "sympy/a/tests/test_b.py[2] \ntest_one ok\ntest_two F\n [FAIL]\n",
            {"test_one": "PASSED", "test_two": "FAILED"},
        ),
        (
            "sphinx-doc/sphinx",
            "\x1b[32mPASSED\x1b[0m tests/test_a.py::\x1b[1mtest_b\x1b[0m\n"
            "\x1b[31mFAILED\x1b[0m tests/test_a.py::\x1b[1mtest_c\x1b[0m - assert 1\n",
            {"tests/test_a.py::test_b": "PASSED", "tests/test_a.py::test_c": "FAILED"},
        ),
    ],
)
def test_another_runners_log_cannot_be_read(repo, log, statuses):
    pytest.importorskip("swebench")
    assert load_harness().parsers[repo](log, None) == statuses


@pytest.mark.usefixtures("pretended")
def test_the_package_sets_up_logging_or_variables(monkeypatch):
    root = logging.getLogger()
    before = (list(root.handlers), root.level, dict(os.environ))
    constants = sys.modules.pop("swebench.harness.constants")

    class Loader:
        """Imports the module, and does what the real one does beside."""

        def find_spec(self, name, path, target=None):
            return spec_from_loader(name, self) if name == constants.__name__ else None

        def create_module(self, spec):
            return None

        def exec_module(self, module):
            module.__dict__.update(MAP_REPO_VERSION_TO_SPECS={})
            root.addHandler(logging.NullHandler())
            root.setLevel(logging.INFO)
            os.environ["SWE_OFFICIAL_TOKEN"] = "read"

    monkeypatch.setattr(sys, "meta_path", [Loader(), *sys.meta_path])
    assert load_harness().specs == {}
    assert (list(root.handlers), root.level, dict(os.environ)) == before


def test_a_very_long_line_takes_very_long():
    pytest.importorskip("swebench")
    harness, start = load_harness(), time.monotonic()
    sympy = replace(INSTANCE, repo="sympy/sympy")
    assert official._parsed(harness, sympy, "_" * 1_000_000 + "\ntest_one ok\n") == {
        "test_one": "PASSED"
    }
    assert time.monotonic() - start < 20


# ------------------------------------------------------------------------------------------ R2E-Gym


def test_what_lies_in_the_place_of_r2e_gyms_tests_is_graded():
    script = (
        "printf '= short test summary info =\\n'; grep -q '+ b' shop/prices.py && "
        "printf 'PASSED r2e_tests/test_1.py::test_sum\\n'"
    )
    instance = Instance("a", "b", "c", "d", eval_script=script, expected={"test_sum": "PASSED"})
    for path in ("r2e_tests/test_1.py", "r2e_tests", "run_tests.sh"):
        stray = change(path, "", "exit 0\n")
        assert not grade_expected(Image(), instance, stray, SessionSpec()).resolved
        there = replace(instance, eval_script=f"test ! -e {path} && {{ {script}; }}")
        assert grade_expected(Image(), there, FIX + stray, SessionSpec()).resolved
