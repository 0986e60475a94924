"""The report repeats what a benchmark showed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def report(import_benchmark: Any) -> Any:
    return import_benchmark("report")


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, import_benchmark: Any) -> Path:
    common = import_benchmark("common")
    monkeypatch.setattr(common, "SHOWN", [])
    common.print_table("Speed", ("player", "ratio", "error"), [("ours", 5.126, 3.81e-6)])
    common.write_json(tmp_path / "whole_step.json", {"ratio": 5.126})
    return tmp_path / "whole_step.json"


def test_a_figure_of_the_report_differs_from_the_benchmarks(results: Path, report: Any) -> None:
    text = report.markdown(json.loads(results.read_text()))
    assert "**Speed**\n\n| player | ratio | error |\n| --- | ---: | ---: |\n" in text
    assert "| ours | 5.13 | 3.81e-06 |" in text


def test_new_figures_stand_beside_the_old_ones(results: Path, report: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n{report.BEGIN}\nold\n{report.END}\n\nThe end.\n")
    for _ in range(2):
        report.main([str(results), "--into", str(page)])
    text = page.read_text()
    assert text.count("### Whole step") == 1
    assert "old" not in text
    page.write_text(
        text.replace("### Whole", "### Another\n\nkept\n\n### Whole").replace("5.13", "?")
    )
    report.main([str(results), "--into", str(page)])
    assert page.read_text() == text.replace("### Whole", "### Another\n\nkept\n\n### Whole")
    assert text.startswith("# Page\n")
    assert text.endswith("\n\nThe end.\n")
    page.write_text("no markers")
    with pytest.raises(ValueError, match="figures"):
        report.main([str(results), "--into", str(page)])
