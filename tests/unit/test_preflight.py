"""The one clear line that each thing missing on a bare machine ends with."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "preflight.py"


@pytest.fixture
def preflight() -> ModuleType:
    spec = importlib.util.spec_from_file_location("preflight", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_disk(monkeypatch, preflight, free_gb):
    usage = SimpleNamespace(free=free_gb * 1e9)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: usage)


def fake_tools(monkeypatch, preflight, *present):
    monkeypatch.setattr(preflight.shutil, "which", lambda tool: tool if tool in present else None)


def test_an_old_python_can_parse_the_script():
    ast.parse(SCRIPT.read_text(), feature_version=(3, 6))


def test_the_script_needs_the_standard_library_alone():
    tree = ast.parse(SCRIPT.read_text())
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert imported <= set(sys.stdlib_module_names)
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]


def test_a_machine_with_everything_passes(monkeypatch, preflight, tmp_path):
    fake_disk(monkeypatch, preflight, 50)
    fake_tools(monkeypatch, preflight, "g++", "make")
    assert preflight.main(["check", "--venv", str(tmp_path / "new" / "venv")]) == 0


@pytest.mark.parametrize("version", [(3, 6, 9), (3, 10, 14), (3, 14, 0), (4, 11, 0)])
def test_a_python_out_of_range_is_named_with_what_to_type(preflight, version):
    line = preflight.python_problem(version)
    assert f"Python {version[0]}.{version[1]} " in line
    assert "3.11 to 3.13" in line
    assert "make install PYTHON=" in line
    assert all(preflight.python_problem((3, minor, 1)) is None for minor in (11, 12, 13))


def test_a_python_without_venv_names_the_system_package(monkeypatch, preflight):
    monkeypatch.setitem(sys.modules, "ensurepip", None)  # None makes its import fail
    assert "python3.12-venv" in preflight.venv_problem((3, 12, 0))


@pytest.mark.parametrize(
    ("present", "named"),
    [
        ((), "g++ and make are missing"),
        (("make",), "g++ is missing"),
        (("g++",), "make is missing"),
    ],
)
def test_missing_tools_are_named_together(monkeypatch, preflight, present, named):
    fake_tools(monkeypatch, preflight, *present)
    assert preflight.tools_problem("linux").startswith(named)
    assert "apt-get install" in preflight.tools_problem("linux")
    assert "xcode-select --install" in preflight.tools_problem("darwin")


def test_a_full_disk_says_how_much_is_free_and_where(monkeypatch, preflight, tmp_path):
    fake_disk(monkeypatch, preflight, 3.2)
    line = preflight.disk_problem(str(tmp_path / "not" / "there" / "venv"))
    assert "3.2 GB free" in line
    assert str(tmp_path) in line
    assert "VENV=" in line
    (tmp_path / preflight.STAMP).touch()  # a renewed install needs less than the first
    assert preflight.disk_problem(str(tmp_path)) is None


def test_check_prints_each_problem_on_a_line_of_its_own(monkeypatch, preflight, tmp_path, capsys):
    fake_disk(monkeypatch, preflight, 0.5)
    fake_tools(monkeypatch, preflight)
    assert preflight.main(["check", "--venv", str(tmp_path)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("preflight: ") for line in lines)


NO_NETWORK = """\
WARNING: Retrying (Retry(total=1, connect=None)) after connection broken by 'NewConnectionError'
WARNING: Retrying (Retry(total=0, connect=None)) after connection broken by 'NewConnectionError'
  ERROR: Could not find a version that satisfies the requirement hatchling (from versions: none)
  ERROR: No matching distribution found for hatchling
  [notice] A new release of pip is available
"""
FULL_DISK = (
    "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
)
OLD_VENV = "ERROR: Package 'aem-lightning' requires a different Python: 3.10.1 not in '>=3.11'\n"
NO_COMPILER = """\
WARNING: Retrying (Retry(total=4, connect=None)) after connection broken by 'NewConnectionError'
  error: subprocess-exited-with-error
  × Building wheel for jericho (pyproject.toml) did not run successfully.
  ERROR: Failed building wheel for jericho
note: This is an issue with the package mentioned above, not pip.
"""
UNKNOWN_VERSION = "ERROR: No matching distribution found for peft==99\n"
CONFLICT = """\
ERROR: Cannot install aem-lightning and torch because these package versions have conflicts.
ERROR: ResolutionImpossible: for help visit https://pip.pypa.io
"""


@pytest.mark.parametrize(
    ("log", "meaning", "last_words"),
    [
        (NO_NETWORK, "no network", "hatchling"),
        (FULL_DISK, "the disk is full", "Errno 28"),
        (OLD_VENV, "outside 3.11 to 3.13", "3.10.1"),
        (NO_COMPILER, "did not compile", "jericho"),
        (UNKNOWN_VERSION, "the package index lacks", "peft==99"),
        (CONFLICT, "contradict", "Cannot install aem-lightning"),
    ],
)
def test_a_failed_install_is_explained_in_one_line(preflight, log, meaning, last_words):
    line = preflight.explain(log)
    assert meaning in line
    assert last_words in line
    assert "\n" not in line


def test_a_failure_nobody_foresaw_shows_its_last_error(preflight):
    assert preflight.explain("Collecting x\nERROR: moon in the way\n[notice] hi\n") == (
        "ERROR: moon in the way"
    )
    assert preflight.explain("") == "the log is empty"


def test_run_keeps_the_output_in_the_log_and_returns_the_status(preflight, tmp_path, capsys):
    log = tmp_path / "install.log"
    command = [sys.executable, "-c", "print('ERROR: said so'); raise SystemExit(3)"]
    assert preflight.main(["run", "--log", str(log), "--", *command]) == 3
    assert log.read_text() == "ERROR: said so\n"
    printed = capsys.readouterr()
    assert printed.err == f"install failed: ERROR: said so (log: {log})\n"
    assert printed.out == ""
    assert preflight.main(["run", "--log", str(log), "--", sys.executable, "-c", "print(1)"]) == 0
    assert capsys.readouterr() == ("", "")
