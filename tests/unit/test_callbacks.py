from __future__ import annotations

import copy
import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from callback_stubs import (
    SECONDS,
    StubAgent,
    curve,
    events,
    fit,
    make_iteration,
    make_trainer,
    ours,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor

from aem_lightning.callbacks import AEMMonitor
from aem_lightning.callbacks.aem import aem_statistics
from aem_lightning.callbacks.step_time import cost_table
from aem_lightning.types import Iteration


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    fit(folder, ours())
    return folder


# --- the monitor's numbers


def test_statistics_are_those_counted_by_hand_and_masked_responses_leave_them_alone() -> None:
    assert aem_statistics(make_iteration(0)) == pytest.approx(
        {
            "aem/entropy": 8 / 16,
            "aem/response_entropy": 8 / 4,
            "aem/predicted_drift_base": (1.0 - 0.5 - 4.0 + 0.0) / 4,
            "aem/predicted_drift": (1.5 - 0.25 - 5.0 + 0.0) / 4,
            "aem/alpha_mean": 4.25 / 4,
            "aem/alpha_min": 0.5,
            "aem/alpha_max": 1.5,
            "aem/gated_groups": 0.5,
            "aem/share_positive": 2 / 4,
            "aem/share_negative": 1 / 4,
            "aem/share_zero": 1 / 4,
            "aem/mass_base_positive": 2.0,
            "aem/mass_base_negative": 2.0,
            "aem/mass_positive": 2.0,
            "aem/mass_negative": 2.5,
            "aem/entropy_positive": 2 / 6,
            "aem/entropy_negative": 2 / 2,
            "aem/entropy_zero": 4 / 8,
            "aem/effect_positive": 1 / 4,
            "aem/effect_negative": 2 / 4,
            "aem/effect_zero": 1 / 4,
        }
    )


def test_statistics_of_nothing_are_no_means_rather_than_nan() -> None:
    iteration = make_iteration(0)
    iteration.batch.loss_mask[:] = False
    statistics = aem_statistics(iteration)
    assert "aem/entropy" not in statistics
    assert "aem/alpha_min" not in statistics
    assert all(np.isfinite(value) for value in statistics.values())


def test_a_response_without_tokens_is_left_out() -> None:
    iteration = make_iteration(0)
    whole = aem_statistics(iteration)
    iteration.batch.loss_mask[3] = True
    iteration.batch.length[4] = 0
    iteration.batch.entropy[4] = float("nan")
    assert aem_statistics(iteration) == whole


def test_statistics_leave_the_iteration_as_it_was() -> None:
    iteration = make_iteration(0)
    before = copy.deepcopy(iteration)
    aem_statistics(iteration)
    for name in ("advantages", "alpha"):
        assert torch.equal(getattr(iteration, name), getattr(before, name))
    for name in ("length", "entropy", "surprisal", "group", "loss_mask"):
        assert torch.equal(getattr(iteration.batch, name), getattr(before.batch, name))


def test_two_ranks_count_as_one_batch_of_both() -> None:
    other = make_iteration(0)
    other.advantages[0], other.alpha[0] = -1.0, 0.25
    vectors: list[Tensor] = []
    written: list[dict[str, float]] = []

    def observe(iteration: Iteration, gather: Any) -> None:
        logger = SimpleNamespace(log_metrics=lambda metrics, step: written.append(metrics))
        strategy = SimpleNamespace(all_gather=gather)
        trainer: Any = SimpleNamespace(
            world_size=2, strategy=strategy, is_global_zero=True, loggers=[logger]
        )
        module: Any = SimpleNamespace(device=torch.device("cpu"))
        outputs: Any = {"iteration": iteration}
        AEMMonitor().on_train_batch_end(trainer, module, outputs, None, 0)

    def keep(vector: Tensor) -> Tensor:
        vectors.append(vector)
        return vector

    observe(other, keep)
    observe(make_iteration(0), lambda vector: torch.stack([vector, vectors[0]]))
    both = written[-1]
    assert both["aem/alpha_min"] == 0.25
    assert both["aem/alpha_max"] == 1.5
    assert both["aem/alpha_mean"] == pytest.approx((4.25 + 3.0) / 8)
    assert both["aem/share_positive"] == pytest.approx(3 / 8)
    assert both["aem/gated_groups"] == pytest.approx(0.5)


# --- a run of Lightning's trainer


def test_weights_are_bit_identical_without_our_callbacks(tmp_path: Path) -> None:
    observed = fit(tmp_path / "a", ours())
    alone = fit(tmp_path / "b", [])
    assert torch.equal(observed.policy.weight, alone.policy.weight)


def test_curves_are_over_iterations_and_not_over_updates(run: Path) -> None:
    # Entropy of response 0 grows by 0.5 an iteration: 1 nat more over 16 tokens.
    expected = {index: (8 + index) / 16 for index in range(4)}
    assert curve(run, "aem/entropy") == pytest.approx(expected)
    assert curve(run, "aem/entropy_drift") == pytest.approx({1: 1 / 16, 2: 1 / 16, 3: 1 / 16})
    assert list(curve(run, "time/share_update")) == [0, 1, 2, 3]


def test_alpha_histogram_counts_the_unmasked_responses(run: Path) -> None:
    histogram = events(run).Histograms("aem/alpha")[-1]
    assert (histogram.step, histogram.histogram_value.num) == (3, 4)
    assert histogram.histogram_value.max == 1.5


def test_a_resumed_run_has_the_curves_of_an_uninterrupted_one(run: Path, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    fit(tmp_path / "first", [*ours(), checkpoint], epochs=1)
    fit(tmp_path / "second", ours(), epochs=2, ckpt_path=tmp_path / "last.ckpt")
    drift = curve(tmp_path / "first", "aem/entropy_drift")
    drift |= curve(tmp_path / "second", "aem/entropy_drift")
    assert drift == curve(run, "aem/entropy_drift")
    resumed = json.loads((tmp_path / "second" / "step_time.json").read_text())
    assert resumed == json.loads((run / "step_time.json").read_text())


def test_a_checkpoint_with_our_states_loads_weights_only(tmp_path: Path) -> None:
    fit(tmp_path, [*ours(), ModelCheckpoint(dirpath=tmp_path, save_last=True)], epochs=1)
    states = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert {"AEMMonitor", "StepTime", "Transcripts"} <= set(states)


def test_no_logger_still_writes_the_files(tmp_path: Path) -> None:
    fit(tmp_path, ours(), epochs=1, logger=False)
    assert (tmp_path / "step_time.json").is_file()
    assert (tmp_path / "transcripts.jsonl").is_file()


def test_every_logger_gets_scalars_and_texts_go_where_they_can(tmp_path: Path) -> None:
    loggers = [
        CSVLogger(tmp_path, name="csv", version=""),
        TensorBoardLogger(tmp_path, name="tb", version=""),
    ]
    fit(tmp_path, ours(), epochs=1, logger=loggers)
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["step"] for row in rows if row["aem/entropy"]} == {"0", "1"}
    assert "transcripts/train_0/text_summary" in events(tmp_path).Tags()["tensors"]


def test_a_module_without_iterations_is_left_in_peace(tmp_path: Path) -> None:
    class Silent(StubAgent):
        def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
            super().training_step(batch, batch_idx)
            return {}

        def validation_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
            return {}

    loader = torch.utils.data.DataLoader(torch.zeros(2, 1))
    make_trainer(tmp_path, ours(), epochs=1).fit(Silent(), loader, loader)
    assert not (tmp_path / "transcripts.jsonl").exists()
    assert not (tmp_path / "step_time.json").exists()


# --- step time


def test_environment_is_inside_rollout_and_not_counted_twice() -> None:
    shares = {row.stage: row.share for row in cost_table(SECONDS)}
    expected = {"rollout": 0.4, "environment": 0.3, "old_logprobs": 0.1, "update": 0.5}
    assert shares == pytest.approx(expected)


def test_the_cost_table_adds_up_the_run_and_stands_in_the_logger(run: Path) -> None:
    written = json.loads((run / "step_time.json").read_text())
    assert (written["iterations"], written["seconds"]) == (4, 40.0)
    assert [row["seconds"] for row in written["stages"]] == [16.0, 12.0, 4.0, 20.0]
    text = events(run).Tensors("time/table/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| rollout | 16.00 | 40.00 % | 45.9 % |" in text


def test_a_run_that_breaks_leaves_its_cost_table(tmp_path: Path) -> None:
    class Breaks(StubAgent):
        def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
            if batch_idx == 1:
                raise RuntimeError("broken")
            return super().training_step(batch, batch_idx)

    loader = torch.utils.data.DataLoader(torch.zeros(2, 1))
    with pytest.raises(RuntimeError, match="broken"):
        make_trainer(tmp_path, ours(), epochs=1).fit(Breaks(), loader)
    assert json.loads((tmp_path / "step_time.json").read_text())["iterations"] == 1
