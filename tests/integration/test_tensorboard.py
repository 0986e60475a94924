"""What a run leaves for TensorBoard and for readers: names, and iterations as the x axis."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import curves, fit, toy_config


@pytest.fixture(scope="module")
def run_folder(toy_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    fit(toy_config(folder, toy_model, "update_epochs=2"))
    return folder


def test_a_panel_is_missing(run_folder: Path) -> None:
    found = set(curves(run_folder))
    assert {
        "train/success_rate",
        "train/return",
        "val/success_rate",
        "val/success_rate/red",
        "rollout/turns",
        "rollout/entropy",
        "rollout/mixed_groups",
        "rollout/skipped_update",
        "policy/surrogate",
        "policy/approx_kl",
        "policy/clip_fraction",
        "policy/ref_kl",
        "policy/grad_norm",
        "policy/lr",
        "aem/entropy",
        "aem/entropy_drift",
        "aem/predicted_drift",
        "aem/predicted_drift_base",
        "aem/alpha_mean",
        "aem/gated_groups",
        "aem/mass_positive",
        "aem/effect_negative",
        "time/rollout",
        "time/environment",
        "time/old_logprobs",
        "time/share_modulation",
        "time/total",
    } <= found


def test_the_x_axis_counts_something_else_than_iterations(run_folder: Path) -> None:
    # Four iterations of two update epochs with four optimizer steps each, in two epochs.
    for name, points in curves(run_folder).items():
        steps = sorted(points)
        if name.startswith("val/"):
            assert len(steps) == 2
            assert steps[-1] <= 4, name
        elif name == "aem/entropy_zero":
            assert set(steps) <= {0, 1, 2, 3}  # only where a response has the advantage 0
        elif name != "epoch":
            assert steps == ([1, 2, 3] if name == "aem/entropy_drift" else [0, 1, 2, 3]), name


def test_entropy_has_two_values(run_folder: Path) -> None:
    found = curves(run_folder)
    assert found["aem/entropy"] == pytest.approx(found["rollout/entropy"], rel=1e-4)


def test_a_file_for_readers_is_missing(run_folder: Path) -> None:
    table = json.loads((run_folder / "step_time.json").read_text())
    assert table["iterations"] == 4
    lines = (run_folder / "transcripts.jsonl").read_text().splitlines()
    assert lines
    assert all(json.loads(line) for line in lines)
    assert (run_folder / "adapter" / "adapter_model.safetensors").is_file()
