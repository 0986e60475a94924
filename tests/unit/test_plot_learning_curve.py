"""The picture of the README comes from a run's own files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from scripts import plot_learning_curve
from torch.utils.tensorboard import SummaryWriter


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with SummaryWriter(str(tmp_path / "tensorboard")) as writer:
        for tag in ("train/success_rate", "val/success_rate", "aem/entropy"):
            for x in range(3):
                writer.add_scalar(tag, x / 10, x)
    result = {"rate": 0.5, "low": 0.4, "high": 0.6}
    summary = {"seed": 3, "iterations": 3, "success_before": result, "success_after": None}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    return tmp_path


def test_curves_are_read_in_order_of_iterations(run: Path) -> None:
    curves = plot_learning_curve.read_curves(run, ("val/success_rate",))
    assert curves["val/success_rate"][0] == [0, 1, 2]
    assert curves["val/success_rate"][1] == pytest.approx([0.0, 0.1, 0.2])


def test_smoothing_is_a_mean_over_what_came_before() -> None:
    assert plot_learning_curve.smooth([1.0, 3.0, 5.0], window=2) == [1.0, 2.0, 4.0]


def test_a_picture_is_drawn_for_a_finished_run(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    target = tmp_path / "curve.png"
    monkeypatch.setattr(sys, "argv", ["plot", str(run), "--out", str(target)])
    plot_learning_curve.main()
    assert target.read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_a_summary_ends_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["plot", str(tmp_path)])
    with pytest.raises(SystemExit, match="no summary"):
        plot_learning_curve.main()
