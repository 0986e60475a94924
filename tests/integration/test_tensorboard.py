"""What a run leaves for its loggers and for readers: names, and iterations as the x axis."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.loggers import Logger, WandbLogger
from runs import curves, fit, toy_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata

from aem_lightning.callbacks.overview import CHARTS
from aem_lightning.runner import parts, trainers
from aem_lightning.runner.checks import ConfigError
from aem_lightning.runner.training import train

SIGNS = ("positive", "negative")
# The names that come first, in the order of a page.
FIRST = [
    *(f"0_overview/1_success_{of}" for of in ("train", "val")),
    *(f"0_overview/2_{name}" for name in ("entropy", "mixed_groups")),
    *(f"0_overview/3_{name}" for name in ("approx_kl", "clip_fraction", "grad_norm")),
    *(f"0_overview/4_{name}" for name in ("seconds", "share_rollout", "share_update")),
]
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
        "time/tokens_per_second",
    } <= found


def test_a_histogram_is_missing(run_folder: Path) -> None:
    found = EventAccumulator(str(run_folder / "tensorboard"), {"histograms": 0})  # 0: all
    found.Reload()
    counts = {}
    for name in ("alpha", *(f"{what}/{sign}" for what in ("alpha", "entropy") for sign in SIGNS)):
        histograms = found.Histograms(f"aem/{name}")
        assert {entry.step for entry in histograms} <= {0, 1, 2, 3}
        counts[name] = {entry.step: entry.histogram_value.num for entry in histograms}
        assert counts[name]
        assert all(num > 0 for num in counts[name].values())
    assert counts["alpha/positive"] == counts["entropy/positive"]
    assert sorted(counts["alpha"]) == [0, 1, 2, 3]
    shares = curves(run_folder)["aem/share_negative"]
    for step, num in counts["entropy/negative"].items():
        assert num == pytest.approx(shares[step] * counts["alpha"][step])


def test_learning_comes_second_on_a_page(run_folder: Path) -> None:
    first = sorted(curves(run_folder))[: len(FIRST)]
    assert first == FIRST
    found = EventAccumulator(str(run_folder / "tensorboard"), {"tensors": 0}).Reload()
    (event,) = found.Tensors("custom_scalars__config__")
    chart = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title for category in chart.category] == list(CHARTS)
    assert chart.category[0].chart[0].multiline.tag == ["train/success_rate$", "val/success_rate$"]
    written = curves(run_folder)
    for category in chart.category:
        for drawn in category.chart:
            for tag in drawn.multiline.tag:
                assert any(re.match(tag, name) for name in written), (drawn.title, tag)


def test_the_x_axis_counts_something_else_than_iterations(run_folder: Path) -> None:
    # Four iterations of two update epochs with four optimizer steps each, in two epochs.
    for name, points in curves(run_folder).items():
        steps = sorted(points)
        if name.startswith("val/") or name == "0_overview/1_success_val":
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
    spread = {name for name in written if re.search(r"/p\d\d$", name)}  # of histograms
    assert {f"aem/alpha/p{q:02d}" for q in (5, 25, 50, 75, 95)} <= spread
    expected = {name: of for name, of in curves(run_folder).items() if name not in FIRST}
    assert written.keys() - spread == expected.keys()
    for name in written.keys() - spread:
        assert written[name] == pytest.approx(expected[name], rel=1e-6), name


def test_the_table_has_no_texts(run_folder: Path) -> None:
    with (run_folder / "csv" / "texts.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"transcripts/train_0", "transcripts/validate_0", "time/table"} <= {
        row["name"] for row in rows
    }
    assert all("**Turn 0**" in row["text"] for row in rows if "transcripts" in row["name"])


def given_back(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Undo at the end what a package does to the environment variables ``names``."""
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_mlflow_lacks_something(
    toy_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="needs pip install 'aem-lightning[mlflow]'")
    from mlflow.tracking import MlflowClient

    given_back(monkeypatch, "MLFLOW_TRACKING_URI")

    fit(toy_config(tmp_path, toy_model, "logger=mlflow", "iterations=2"))
    client = MlflowClient(f"sqlite:///{tmp_path}/logs/mlflow.db")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.data.params["optimizer/lr"] == "0.001"
    assert {*FIRST, "val/success_rate", "aem/alpha/p50", "aem/entropy/negative/p05"} <= set(
        run.data.metrics
    )
    success = client.get_metric_history(run.info.run_id, "train/success_rate")
    assert [point.step for point in success] == [0, 1]
    (text,) = client.list_artifacts(run.info.run_id, "transcripts/train_0")
    saved = tmp_path / "logs" / "mlflow" / run.info.run_id / "artifacts" / text.path
    assert "**Turn 0**" in saved.read_text()


def test_wandb_lacks_something(
    toy_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="needs pip install 'aem-lightning[wandb]'")
    monkeypatch.setenv("WANDB_SILENT", "true")
    given_back(monkeypatch, "WANDB_MODE", "WANDB_SERVICE")
    offline = "logger.wandb.offline=true"
    cfg = toy_config(tmp_path, toy_model, "logger=wandb", offline, "iterations=2", "evaluate=false")
    train(cfg)
    assert wandb.run is None, "the next run of this process would go on in it"
    wandb.teardown()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    written = file.read_bytes()
    for name in (*FIRST, "val/success_rate", "aem/alpha/positive", "micro_batch_tokens"):
        assert name.encode() in written, name
    assert b"histogram" in written
    (table,) = folder.glob("files/media/table/transcripts/train_0_*.json")
    assert "**Turn 0**" in json.loads(table.read_text())["data"][0][1]


def test_a_service_that_cannot_be_reached_is_told_after_the_warm_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Away(WandbLogger):
        def __init__(self) -> None:
            Logger.__init__(self)

        @property
        def experiment(self) -> None:
            raise OSError("No API key\nconfigured.")

    monkeypatch.setattr(trainers, "_named", lambda group, _: [Away()] if group == "logger" else [])
    said = "No API key configured. To write to this machine alone type logger.wandb.offline=true"
    with pytest.raises(ConfigError, match=re.escape(said)):
        trainers.build_trainer(toy_config(tmp_path, None))


def test_a_missing_package_is_told_late(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(parts, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        parts.check_classes(toy_config(tmp_path, None, "logger=many"), ["logger"])
    assert "type pip install 'aem-lightning[wandb]', or logger.wandb=null" in str(caught.value)
    assert "type pip install 'aem-lightning[mlflow]', or logger.mlflow=null" in str(caught.value)


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
