"""The notebooks run from top to bottom, and what they say and assert holds."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ROOT

FIVE_MINUTES, SIMPLEX = (
    ROOT / "notebooks" / f"{name}.ipynb" for name in ("aem_in_five_minutes", "simplex")
)


@pytest.fixture
def executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(FIVE_MINUTES, as_version=4)
    for cell in notebook.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
    client = nbclient.NotebookClient(
        notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}
    )
    return client.execute()


def test_the_notebook_breaks_or_its_numbers_do(executed: Any) -> None:
    said = "".join(
        output.get("text", "")
        for cell in executed.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream"
    )
    for alpha in ("1.519441", "0.921588", "0.558971", "1.187691", "0.436927"):
        assert alpha in said
    pictures = [
        output
        for cell in executed.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 1


def test_the_theorem_or_the_notebook_breaks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.close("all")  # those of an earlier test
    figures: list[int] = []
    monkeypatch.setattr(pyplot, "show", lambda: figures.extend(pyplot.get_fignums()))
    space: dict[str, Any] = {}
    before = torch.get_default_dtype()
    try:
        for cell in json.loads(SIMPLEX.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), str(SIMPLEX), "exec"), space)
    finally:
        torch.set_default_dtype(before)
    pyplot.close("all")
    assert len(set(figures)) == 2
    said = capsys.readouterr().out
    assert space["worst_natural"] < 1e-6
    shares = [float(found) for found in re.findall(r"([\d.]+) %", said)]
    assert len(shares) == 3
    assert 85 < shares[0] < 100, "the plain gradient mostly has the theorem's sign"
    assert all(share > 80 for share in shares[1:]), "AEM's drift mostly has the predicted sign"


def test_the_notebook_carries_outputs() -> None:
    content = json.loads(SIMPLEX.read_text(encoding="utf-8"))
    assert not [cell for cell in content["cells"] if cell.get("outputs")]
