"""What is handed to people who have no checkout: wheel, lock file, licences, images, workflow."""

from __future__ import annotations

import re
import shlex
import sys
import tomllib
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from runs import CONFIGS, ROOT, composed
from test_makefile import PINS, normal

from aem_lightning.runner import next_steps, shipped
from aem_lightning.runner.commands import copy_configs
from aem_lightning.runner.next_steps import after_training
from aem_lightning.runner.shipped import as_typed

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = (ROOT / "requirements.lock").read_text()
IMAGES = sorted((ROOT / "docker").glob("*.Dockerfile"))


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The folder of an environment that has the wheel and no checkout; a command of it runs."""
    package = tmp_path / "lib" / "aem_lightning"
    monkeypatch.setattr(shipped, "PACKAGE", package)
    monkeypatch.setattr(shipped, "CHECKOUT", package.parents[1])
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("python", "aem-train", "aem-eval"):
        (folder / name).touch(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setattr(sys, "argv", [str(folder / "aem-train")])
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("AEM_LIGHTNING_ROOT", raising=False)
    return tmp_path


def test_the_wheel_lacks_what_an_installed_package_looks_for(installed):
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    places = sorted(wheel["sources"].items(), key=lambda place: -len(place[0]))
    for name in ("configs", "docs/names.md"):
        assert any((ROOT / name).is_relative_to(ROOT / each) for each in wheel["only-include"])
        source, target = next(place for place in places if name.startswith(place[0]))
        inside = shipped.PACKAGE.parent / name.replace(source, target, 1)
        inside.parent.mkdir(parents=True, exist_ok=True)
        inside.touch()
        assert shipped.shipped(name) == inside


@pytest.mark.parametrize("place", PROJECT["project"]["scripts"].values())
def test_a_command_of_the_wheel_has_no_function(place):
    module, _, name = place.partition(":")
    assert callable(getattr(import_module(module), name))


def test_an_install_prints_scripts_of_a_checkout(installed, monkeypatch):
    cfg = composed(["experiment=quickstart"])
    assert after_training(cfg, Path("last.ckpt"))[0] == "aem-eval ckpt_path=last.ckpt"
    monkeypatch.setenv("PATH", "/nowhere")
    typed = shlex.split(after_training(cfg, Path("last.ckpt"))[0])
    assert typed == [str(installed / "bin" / "aem-eval"), "ckpt_path=last.ckpt"]
    told = "Type python train.py a=b, or `python eval.py`; python -m aem_lightning.viewer X"
    assert as_typed(told) == "Type aem-train a=b, or `aem-eval`; aem-view X"
    assert as_typed("python -m aem_lightning.analysis cost") == "aem-analysis cost"
    assert as_typed("/my/train.py and my_eval.py") == "/my/train.py and my_eval.py"
    monkeypatch.setattr(sys, "argv", ["train.py"])  # of a checkout beside the install
    assert as_typed(told) == told


def test_a_copy_of_the_configs_is_partial_or_overwrites(tmp_path, capsys):
    folder = tmp_path / "my configs"
    copy_configs([str(folder)])
    assert f"--config-dir '{folder}'" in capsys.readouterr().out
    names = {path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.yaml")}
    assert {path.relative_to(folder) for path in folder.rglob("*.yaml")} == names
    (folder / "train.yaml").write_text("mine")
    with pytest.raises(SystemExit, match="nothing in it is overwritten"):
        copy_configs([str(folder)])
    assert (folder / "train.yaml").read_text() == "mine"
    with pytest.raises(SystemExit, match="Not a directory"):
        copy_configs([str(folder / "train.yaml" / "x")])


def test_a_file_of_the_projects_comes_before_that_of_config_dir(tmp_path, command):
    own = tmp_path / "own"
    (own / "scheduler").mkdir(parents=True)
    (own / "scheduler" / "constant.yaml").write_text("_target_: mine\n")
    (own / "scheduler" / "steps.yaml").write_text("_target_: other # of mine\n")
    shown = command("train.py", "--cfg", "job", "--config-dir", str(own))
    assert "scheduler:\n  _target_: mine\n" in shown.said
    shown = command("train.py", "scheduler=steps", "--cfg", "job", f"--config-dir={own}")
    assert "scheduler:\n  _target_: other\n" in shown.said
    told = command("train.py", "scheduler=step", "--config-dir", str(own))
    told.assert_clear("scheduler=step: there is no such option", "steps")
    command("train.py", "--config-dir", "/no/where").assert_clear("there is no such folder")
    command("eval.py", "--config-path", str(own)).assert_clear(f"type --config-dir {own}")


def test_a_printed_command_forgets_the_folder_of_options(tmp_path, monkeypatch):
    sources = [
        SimpleNamespace(provider="main", path=str(CONFIGS)),
        SimpleNamespace(provider="command-line", path=str(tmp_path)),
    ]
    of_a_run = SimpleNamespace(runtime=SimpleNamespace(config_sources=sources))
    hydra = SimpleNamespace(initialized=lambda: True, get=lambda: of_a_run)
    monkeypatch.setattr(next_steps, "HydraConfig", hydra)
    line = after_training(composed([]), Path("last.ckpt"))[0]
    assert shlex.split(line)[-2:] == ["--config-dir", str(tmp_path)]


def test_the_lock_holds_other_versions_than_the_pins():
    locked = dict(re.findall(r"^([A-Za-z0-9._-]+)==([^ ;\\]+)", LOCK, re.MULTILINE))
    pinned = {normal(name): version for name, _, version in (pin.partition("==") for pin in PINS)}
    assert len(locked) > 150
    assert {n: v for n, v in locked.items() if pinned.get(n, v) != v} == {}
    wanted = {normal(re.match(r"[\w.-]+", want)[0]) for want in PROJECT["project"]["dependencies"]}
    assert wanted <= set(locked)
    entries = re.split(r"\n(?=[A-Za-z])", LOCK)[1:]
    assert [entry for entry in entries if "--hash=sha256:" not in entry] == []


def test_a_dependency_has_no_licence():
    extras = PROJECT["project"]["optional-dependencies"]
    wants = [*PROJECT["project"]["dependencies"], *(w for group in extras.values() for w in group)]
    names = {re.match(r"[A-Za-z0-9._-]+", want)[0] for want in wants} - {"aem-lightning"}
    rows = re.findall(r"^\| (\S+) \| \S.* \| .+ \|$", (ROOT / "docs/licences.md").read_text(), re.M)
    assert names == set(rows) - {"package"}


@pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.stem)
def test_an_image_copies_what_is_not_there_or_ignored(image):
    assert len(IMAGES) == 2
    allowed = [
        line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")
    ]
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", image.read_text(), re.MULTILINE)
    for name in " ".join(copied).split():
        assert (ROOT / name).exists()
        assert any(fnmatch(name, pattern) for pattern in allowed)
    assert "USER aem" in image.read_text()


def test_the_workflow_does_something_else_than_the_ci():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    job = workflow["jobs"]["check"]
    assert job["steps"][-1] == {"run": ".ci/run"}
    told = {c.rpartition(" ")[2] for c in PROJECT["project"]["classifiers"] if ":: 3." in c}
    assert set(job["strategy"]["matrix"]["python"]) == told
    assert job["env"]["PYTHON"] == "python${{ matrix.python }}"  # the Makefile's variable
    targets = re.search(r"^make (.+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)[1]
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert set(targets.split()) <= set(phony.split())
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml.safe_load(form.read_text())


def test_the_citation_is_of_another_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["project"]["version"]
    assert citation["repository-code"] == PROJECT["project"]["urls"]["Homepage"]
    (paper,) = citation["references"]
    assert paper["url"] == "https://arxiv.org/abs/2605.00425"
