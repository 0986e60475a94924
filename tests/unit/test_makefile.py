"""The Makefile's promises, without running an install."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PINS = [
    line.strip()
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line.strip() and not line.startswith("#")
]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def make(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    # The tests may run under make themselves: its flags must not reach the inner make.
    outer = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES", "VENV", "PYTHON", "ARGS"}
    inherited = {name: value for name, value in os.environ.items() if name not in outer}
    return subprocess.run(
        ["make", *words],
        cwd=folder,
        env=inherited | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that the Makefile reads, in a folder of their own."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    return tmp_path


def pretend_venv(folder: Path) -> None:
    """An outdated install whose Python only notes what it was asked."""
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "python"
    python.write_text('#!/bin/sh\necho "$@" >> "$(dirname "$0")/../calls"\n')
    python.chmod(0o755)
    # A renewed install asks for less free disk than a first one, so small disks can run the tests.
    (folder / ".installed").touch()
    os.utime(folder / ".installed", (0, 0))


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


def test_make_alone_lists_every_target(checkout):
    listed = make(checkout).stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in phony[1].split():
        assert f"make {target} " in listed


def test_train_installs_first_and_passes_the_overrides_on(checkout):
    venv = checkout / "elsewhere"
    pretend_venv(venv)
    done = make(checkout, "train", f"VENV={venv}", "ARGS=seed=7 trainer.max_epochs=2")
    assert done.returncode == 0, done.stderr
    install, train = calls(venv)
    assert install.endswith("-m pip install -c constraints.txt -e .[all]")
    assert train == "train.py experiment=quickstart seed=7 trainer.max_epochs=2"


def test_an_install_happens_once_until_the_pins_change(checkout):
    venv = checkout / ".venv"
    pretend_venv(venv)
    for _ in range(2):
        assert make(checkout, "type").returncode == 0
    assert [call for call in calls(venv) if "pip install" in call] == calls(venv)[:1]
    newer = (venv / ".installed").stat().st_mtime + 10
    os.utime(checkout / "constraints.txt", (newer, newer))
    make(checkout, "type")
    assert sum("pip install" in call for call in calls(venv)) == 2


def test_a_failed_install_is_tried_again(checkout):
    venv = checkout / ".venv"
    pretend_venv(venv)
    (venv / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    assert make(checkout, "install").returncode != 0
    assert (venv / ".installed").stat().st_mtime == 0


@pytest.mark.parametrize("python", ["no-such-python", "old-python"])
def test_a_python_that_does_not_do_ends_with_one_line(checkout, python):
    if python == "old-python":
        tools = checkout / "tools"
        tools.mkdir()
        (tools / python).write_text(
            "#!/bin/sh\necho 'preflight: Python 3.6 is out of range' >&2; exit 1\n"
        )
        (tools / python).chmod(0o755)
    path = f"{checkout / 'tools'}:{os.environ['PATH']}"
    done = make(checkout, "install", f"PYTHON={python}", PATH=path)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert len(said) == 1
    assert said[0].startswith("preflight: ")
    assert not (checkout / ".venv").exists()


def test_every_package_is_pinned_by_version():
    assert [
        pin for pin in PINS if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", pin)
    ] == []


def test_every_named_dependency_has_its_pin():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(name for group in extras.values() for name in group)]
    names = {normal(re.match(r"[A-Za-z0-9._-]+", want)[0]) for want in wanted} - {"aem-lightning"}
    assert names - {normal(pin.split("==")[0]) for pin in PINS} == set()


def test_all_is_the_union_of_the_other_extras_but_five():
    """Two bring over a hundred packages: `make test-adapters` installs them. Two are services."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    named = re.fullmatch(r"aem-lightning\[(.*)\]", extras["all"][0])[1].split(",")
    assert set(named) == set(extras) - {
        *("all", "adapters", "mlflow", "swebench", "sweep", "wandb"),
    }
