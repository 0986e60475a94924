"""The notebooks run from top to bottom, and what they say and assert holds."""

from __future__ import annotations

import json
import re
import runpy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ROOT

FOLDER = ROOT / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def cells(name: str) -> list[dict[str, Any]]:
    content = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in content["cells"] if cell["cell_type"] == "code"]


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """Runs the cells of a notebook here, without a kernel; its variables, and how many figures."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.close("all")  # those of an earlier test
    figures: set[int] = set()
    monkeypatch.setattr(pyplot, "show", lambda: figures.update(pyplot.get_fignums()))
    monkeypatch.chdir(FOLDER)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = torch.get_default_dtype(), set(sys.modules)

    def play(name: str) -> dict[str, Any]:
        space: dict[str, Any] = {"figures": figures}
        try:
            for cell in cells(name):
                exec(compile("".join(cell["source"]), name, "exec"), space)
        finally:
            torch.set_default_dtype(before[0])
            pyplot.close("all")
            for module in {"doors", "broken_doors"} & set(sys.modules) - before[1]:
                del sys.modules[module]
        return space

    return play


def test_the_notebook_breaks_or_its_numbers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("nbformat", "nbclient", "ipykernel", "matplotlib"):
        pytest.importorskip(module)
    for variable in ("PYTHONPATH", "PYTHONWARNINGS"):
        monkeypatch.setenv(variable, "")  # put back afterwards
    notebooks = runpy.run_path(str(ROOT / "scripts" / "notebooks.py"))
    executed = notebooks["execute"](FOLDER / "aem_in_five_minutes.ipynb", 120)
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    said = "".join(output.get("text", "") for output in outputs)
    for alpha in ("1.519441", "0.921588", "0.558971", "1.187691", "0.436927"):
        assert alpha in said
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1


def test_the_theorem_or_the_notebook_breaks(
    played: Callable[[str], dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    space = played("simplex")
    assert len(space["figures"]) == 2
    assert space["worst_natural"] < 1e-6
    shares = [float(found) for found in re.findall(r"([\d.]+) %", capsys.readouterr().out)]
    assert len(shares) == 3
    assert 85 < shares[0] < 100, "the plain gradient mostly has the theorem's sign"
    assert all(share > 80 for share in shares[1:]), "AEM's drift mostly has the predicted sign"


def test_the_estimators_of_the_notebook_differ_elsewhere_than_it_says(
    played: Callable[[str], dict[str, Any]],
) -> None:
    space = played("compare_estimators")
    of = {name: space["table"][:, place] for place, name in enumerate(space["ESTIMATORS"])}
    hard = torch.tensor([label.startswith("hard") for label in space["labels"]])
    wins = torch.tensor(["(won)" in label for label in space["labels"]])
    assert of["REINFORCE++"][wins].unique().numel() == 1, "a win is worth the same in both tasks"
    assert of["MaxRL"][hard & wins].min() > of["MaxRL"][~hard & wins].max()
    assert not of["QAE"][hard & ~wins].any()
    assert not of["QAE"][~hard & wins].any()


@pytest.mark.soak  # two minutes; `make notebooks` runs them too
@pytest.mark.parametrize("name", ["own_environment", "train_and_read"])
def test_the_training_of_a_notebook_breaks(
    name: str,
    played: Callable[[str], dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    space = played(name)
    assert len(space["figures"]) == 1
    assert (space["run"] / "checkpoints" / "last.ckpt").is_file()
    said = capsys.readouterr().out
    assert f"iteration {space['summary']['iterations']}/" in said
    assert ("breaches" in said) == (name == "own_environment")


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_kept_without_outputs_or_with_a_place_of_somebody(name: str) -> None:
    outputs = [output for cell in cells(name) for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert all(cell["execution_count"] for cell in cells(name)), "type make notebooks"
    told = json.dumps(outputs)
    assert '"error"' not in told
    assert "stderr" not in told
    places = str(ROOT), str(Path.home()), tempfile.gettempdir()
    assert not [place for place in places if f"{place}/" in told]
