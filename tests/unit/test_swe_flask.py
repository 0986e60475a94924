"""Two genuine rows of SWE-bench, from a clone and as images: graded as `swebench` itself grades.

The rows and the repository are not part of this project: `AEM_FLASK_ROWS` and `AEM_FLASK_CLONE`
name them, and docs/swe.md says where they are to be had.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import local_image
import pytest

from aem_lightning.envs.swe import Instance, SweEnv, SweSettings, load_instances
from aem_lightning.envs.swe.bash import SUBMIT
from aem_lightning.envs.swe.env import grade_change
from aem_lightning.envs.swe.official import load_harness
from aem_lightning.envs.swe.records import PREDICTIONS
from aem_lightning.envs.swe.repositories import Repositories, git
from aem_lightning.envs.swe.sandbox import (
    BubblewrapSandbox,
    DockerSandbox,
    Limits,
    bubblewrap,
)
from aem_lightning.envs.swe.sandbox.engine import ask
from aem_lightning.envs.swe.validate import validate

BESIDE = Path(__file__).parents[3] / "shared" / "real" / "swe" / "flask_rows_classic.json"
ROWS = os.environ.get("AEM_FLASK_ROWS", str(BESIDE))
CLONE = os.environ.get("AEM_FLASK_CLONE", "")
pytestmark = pytest.mark.skipif(
    not Path(ROWS).is_file() or not CLONE or not Path(CLONE).is_dir(),
    reason=f"AEM_FLASK_CLONE={CLONE!r} and AEM_FLASK_ROWS={ROWS!r} have to name a clone (git clone "
    "--bare https://github.com/pallets/flask pallets__flask.git) and a JSON file with the rows "
    "pallets__flask-4992 and pallets__flask-5063 of SWE-bench (SWE-bench/SWE-bench_Lite has them)",
)
# The fix, with a part of it as somebody would have it who did not read to the end.
WRONG = {
    "pallets__flask-4992": ('"r" if text else "rb"', '"r"'),
    "pallets__flask-5063": ('"Host" if host_matching else "Subdomain"', '"Subdomain"'),
}
OWNER = "aem-swe-test"  # nobody's genuine images are touched
ENVIRONMENT = "opt/miniconda3/envs/testbed"
# What SWE-bench's scripts ask of conda.
ACTIVATE = f'conda() {{ export PATH="/{ENVIRONMENT}/bin:$PATH"; }}\n'
RUN_PYTEST = f"#!/{ENVIRONMENT}/bin/python\nimport sys, pytest\nsys.exit(pytest.console_main())\n"
CHANGES = {"gold": 1.0, "empty": 0.0, "wrong": 0.0, "tested": 1.0}


def rows() -> list[dict[str, Any]]:
    return [row for row in json.loads(Path(ROWS).read_text()) if row["instance_id"] in WRONG]


def changed(instance: Instance, kind: str) -> str:
    """A change of that kind."""
    if kind == "wrong":
        before, after = WRONG[instance.instance_id]
        assert before in instance.patch
        return instance.patch.replace(before, after)
    if kind == "tested":  # with tests of the agent's own, in the files that hidden ones come to
        own = re.sub(r"(?m)^\+( *)def test_", r"+\1def test_my_", instance.test_patch)
        return instance.patch + own
    return instance.patch if kind == "gold" else ""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What flask needed then: what SWE-bench pins, and its own list for tests."""
    pytest.importorskip("swebench", reason="pip install 'aem-lightning[swebench]' for these rows")
    place, (row, *_) = tmp_path_factory.mktemp("packages"), rows()
    commit = row["environment_setup_commit"]
    listed = git("show", f"{commit}:requirements/tests.txt", cwd=Path(CLONE))
    (place / "tests.txt").write_bytes(listed.stdout)
    pinned = load_harness().specs[row["repo"]][row["version"]]["pip_packages"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(place / "site")]
    wanted = ["-r", str(place / "tests.txt"), *pinned, "blinker>=1.6.2"]
    done = subprocess.run([*pip, *wanted], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"pip cannot install what flask needed: {done.stderr.strip()[-300:]}")
    return place / "site"


@pytest.fixture(scope="module")
def instances(tmp_path_factory: pytest.TempPathFactory) -> list[Instance]:
    found = load_instances("json", ROWS, cache_dir=str(tmp_path_factory.mktemp("cache")))
    chosen = [instance for instance in found if instance.instance_id in WRONG]
    assert [instance.instance_id for instance in chosen] == sorted(WRONG)
    return chosen


# ------------------------------------------------------------------------------------ from a clone


@pytest.fixture
def clones(tmp_path: Path) -> SweSettings:
    (tmp_path / "pallets__flask.git").symlink_to(Path(CLONE).resolve())
    return SweSettings("bubblewrap", repositories=str(tmp_path))


def test_a_clones_rows_are_graded_otherwise_than_by_their_fix(
    instances: list[Instance],
    clones: SweSettings,
    packages: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = BubblewrapSandbox().probe()
    if not found.usable:
        pytest.skip(found.reason)
    sources = {sys.base_prefix: "/opt/python", str(packages): "/opt/site"}
    monkeypatch.setattr(bubblewrap, "_sources", lambda: sources)
    repositories = Repositories(clones.repositories)
    for instance in map(repositories.located, instances):
        files = repositories.base(instance)
        for kind, reward in CHANGES.items():
            change = changed(instance, kind)
            grade = grade_change(BubblewrapSandbox(), clones, instance, files, change)
            assert grade.resolved == bool(reward), (instance.instance_id, kind, grade)
            assert (grade.infra_error, grade.tampered) == (None, ())
    verdicts = validate(instances, clones, tmp_path / "verdicts.jsonl")
    assert [verdict.problem for verdict in verdicts.values()] == ["", ""]


# --------------------------------------------------------------------------------------- as images


def image_name(instance_id: str) -> str:
    """As the harness looks for it, but for who published it."""
    name = f"sweb.eval.x86_64.{instance_id}".replace("__", "_1776_")
    return f"{OWNER}/{name}:latest"


def add_environment(archive: tarfile.TarFile, packages: Path, repository: Path) -> None:
    """The repository in /testbed, and the Python that its tests run in."""
    library = f"{ENVIRONMENT}/lib/python{local_image.VERSION}/site-packages"
    python = f"/opt/python/bin/python{local_image.VERSION}"
    files = {
        f"{ENVIRONMENT}/pyvenv.cfg": "home = /opt/python/bin\n",
        f"{ENVIRONMENT}/bin/pytest": RUN_PYTEST,
        "opt/miniconda3/bin/activate": ACTIVATE,
        "etc/passwd": "root:x:0:0::/root:/bin/bash\n",  # whom the harness asks for by name
        "root/.profile": "",
        f"{library}/flask.pth": "/testbed/src\n",  # as an editable install leaves it
    }
    for name, text in files.items():
        local_image.add_text(archive, name, text)
    local_image.link(archive, f"{ENVIRONMENT}/bin/python", python)
    for place, name in ((packages, library), (repository, "testbed")):
        archive.add(place, name, filter=owned_by_root)


def owned_by_root(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    return entry


def check_out(commit: str, place: Path) -> Path:
    """The repository at a commit, without what came after it."""
    place.mkdir()
    for words in (
        ("init", "--quiet", "."),
        ("fetch", "--quiet", "--depth", "1", Path(CLONE).resolve().as_uri(), commit),
        ("checkout", "--quiet", "FETCH_HEAD"),
    ):
        done = git(*words, cwd=place)
        assert not done.returncode, done.stderr
    return place


@pytest.fixture(scope="module")
def images(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The image of each row, by its id."""
    found = DockerSandbox().probe()
    if not found.usable:
        pytest.skip(found.reason)
    made: dict[str, str] = {}
    for row in rows():
        name = row["instance_id"]
        repository = check_out(row["base_commit"], tmp_path_factory.mktemp("made") / "testbed")
        more = partial(add_environment, packages=packages, repository=repository)
        made[name] = local_image.build(image_name(name), more)
    yield made
    ask("image", "rm", "--force", *made.values())


def play(env: SweEnv, instance: Instance, change: str) -> tuple[float, Mapping[str, Any]]:
    """The reward of an agent who writes that change, and what is said of it."""
    env.reset(options={"task_id": instance.instance_id})
    commands = [f"git apply <<'END_OF_PATCH'\n{change}\nEND_OF_PATCH"] if change else []
    for command in (*commands, f"echo {SUBMIT}"):
        _, reward, terminated, truncated, info = env.step(f"```bash\n{command}\n```")
        assert not truncated, info
    assert terminated
    return reward, info


# It asks GitHub what flask needed, also where the image is there: the clone answers.
HARNESS = f"""
import pathlib, runpy, types
import requests
from aem_lightning.envs.swe.repositories import git


def get(url, headers):
    commit, _, path = url.partition("/pallets/flask/")[2].partition("/")
    found = git("show", commit + ":" + path, cwd=pathlib.Path({CLONE!r}))
    status = 404 if found.returncode else 200
    return types.SimpleNamespace(status_code=status, text=found.stdout.decode())


requests.get = get
runpy.run_module("swebench.harness.run_evaluation", run_name="__main__", alter_sys=True)
"""


def harness_says(records: Path, rows_file: Path) -> dict[str, bool]:
    """What the official harness makes of the predictions of a folder, by instance."""
    options = {
        "--dataset_name": rows_file,
        "--predictions_path": records / PREDICTIONS,
        "--run_id": records.name,
        "--namespace": OWNER,
        "--max_workers": 2,
        "--cache_level": "instance",
    }
    words = [str(word) for pair in options.items() for word in pair]
    command = [sys.executable, "-c", HARNESS, *words]
    done = subprocess.run(command, cwd=records, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (report,) = records.glob(f"*.{records.name}.json")
    said = json.loads(report.read_text())
    assert said["error_instances"] == 0, (said, done.stdout[-2000:])
    for theirs in records.glob("logs/*/*/*/*/report.json"):
        ours = json.loads((records / theirs.parent.name / "1" / "report.json").read_text())
        assert_agree(ours[theirs.parent.name], json.loads(theirs.read_text())[theirs.parent.name])
    return {name: name in said["resolved_ids"] for name in said["submitted_ids"]}


def assert_agree(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Hold a report against the harness's, test by test."""
    assert {name: ours[name] for name in theirs if name != "tests_status"} == {
        name: theirs[name] for name in theirs if name != "tests_status"
    }
    for column, tests in ours["tests_status"].items():
        assert tests == theirs["tests_status"][column]


@pytest.mark.parametrize("kind", CHANGES)
def test_an_images_rows_are_graded_otherwise_than_by_the_official_harness(
    kind: str, instances: list[Instance], images: dict[str, str], tmp_path: Path
) -> None:
    records, rows_file = tmp_path / kind, tmp_path / "rows.json"
    rows_file.write_text(json.dumps(rows()))
    played = [replace(instance, image=images[instance.instance_id]) for instance in instances]
    settings = SweSettings(
        dialect="bash", limits=Limits(disk_bytes=1 << 30), records=str(records), model_name=kind
    )
    with closing(SweEnv(played, settings)) as env:
        for instance in played:
            reward, info = play(env, instance, changed(instance, kind))
            assert reward == CHANGES[kind], info["reason"]
            assert info["tampered"] == []
    said = harness_says(records, rows_file)
    assert said == dict.fromkeys(WRONG, bool(CHANGES[kind]))
