"""What a run leaves for its loggers and for readers: names, and iterations as the x axis."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml
from runs import curves, fit, toy_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

SIGNS = ("positive", "negative")
# The paper's cost table, in its order.
STAGES = (
    "rollout",
    "environment",
    "old_logprobs",
    "ref_logprobs",
    "advantage",
    "modulation",
    "update",
)


@pytest.fixture(scope="module")
def run_folder(toy_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    fit(toy_config(folder, toy_model, "update_epochs=2", "logger=[tensorboard,csv]"))
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
        "aem/alpha_min",
        "aem/alpha_max",
        "aem/gated_groups",
        *(
            f"aem/{what}_{sign}"
            for what in ("share", "mass", "entropy", "effect")
            for sign in SIGNS
        ),
        *(f"time/{what}{stage}" for what in ("", "share_") for stage in STAGES),
        "time/total",
    } <= found


def test_the_histogram_of_alpha_is_missing(run_folder: Path) -> None:
    found = EventAccumulator(str(run_folder / "tensorboard"), {"histograms": 0})  # 0: all
    found.Reload()
    histograms = found.Histograms("aem/alpha")
    assert [entry.step for entry in histograms] == [0, 1, 2, 3]
    assert all(entry.histogram_value.num > 0 for entry in histograms)


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


def test_a_curve_has_a_point_twice(run_folder: Path) -> None:
    found = EventAccumulator(str(run_folder / "tensorboard"), {"scalars": 0}).Reload()
    steps = {name: [e.step for e in found.Scalars(name)] for name in found.Tags()["scalars"]}
    assert {name for name, of in steps.items() if len(set(of)) < len(of)} <= {"epoch"}


def test_the_table_of_a_second_logger_lacks_points(run_folder: Path) -> None:
    written: dict[str, dict[int, float]] = {}
    with (run_folder / "csv" / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name != "step":
                    written.setdefault(name, {})[int(row["step"])] = float(value)
    expected = curves(run_folder)
    assert written.keys() == expected.keys()
    for name, points in written.items():
        assert points == pytest.approx(expected[name], rel=1e-6), name


def test_hyperparameters_are_missing(run_folder: Path) -> None:
    given = yaml.safe_load((run_folder / "tensorboard" / "hparams.yaml").read_text())
    assert (given["optimizer"]["lr"], given["seed"], given["group_size"]) == (1e-3, 0, 4)
    assert "paths" not in given
    found = EventAccumulator(str(run_folder / "tensorboard"))
    found.Reload()
    table = {
        tag: metadata.parse_experiment_plugin_data(content)
        if tag.endswith("experiment")
        else metadata.parse_session_start_info_plugin_data(content)
        for tag, content in found.PluginTagToContent("hparams").items()
        if not tag.endswith("session_end_info")
    }
    columns = table[metadata.EXPERIMENT_TAG]
    assert [info.name.tag for info in columns.metric_infos] == ["val/success_rate"]
    row = table[metadata.SESSION_START_INFO_TAG].hparams
    assert row["optimizer/lr"].number_value == 1e-3
    assert row["group_size"].number_value == 4


def test_entropy_has_two_values(run_folder: Path) -> None:
    found = curves(run_folder)
    assert found["aem/entropy"] == pytest.approx(found["rollout/entropy"], rel=1e-4)


def test_a_file_for_readers_is_missing(run_folder: Path) -> None:
    table = json.loads((run_folder / "step_time.json").read_text())
    assert table["iterations"] == 4
    assert [row["stage"] for row in table["stages"]] == list(STAGES)
    shares = {row["stage"]: row["share"] for row in table["stages"]}
    assert sum(shares.values()) - shares["environment"] == pytest.approx(1)
    lines = (run_folder / "transcripts.jsonl").read_text().splitlines()
    assert lines
    assert all(json.loads(line) for line in lines)
    assert (run_folder / "adapter" / "adapter_model.safetensors").is_file()
