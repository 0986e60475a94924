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
    StubPolicy,
    curve,
    events,
    fit,
    json_lines,
    make_iteration,
    make_trainer,
    ours,
    two_batches,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.plugin_util import markdown_to_safe_html
from torch import Tensor

from aem_lightning.callbacks import AdapterExport, AEMMonitor, Transcripts
from aem_lightning.callbacks.adapter_export import export_adapter, recover
from aem_lightning.callbacks.aem import aem_statistics
from aem_lightning.callbacks.step_time import cost_table
from aem_lightning.callbacks.transcripts import (
    append_json_line,
    episode_markdown,
    episode_record,
    recorded_episode,
)
from aem_lightning.types import Iteration


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StubAgent]:
    """A run with every callback of ours: its folder and the agent after it."""
    folder = tmp_path_factory.mktemp("run")
    return folder, fit(folder, ours())


@pytest.fixture(scope="module")
def run(observed: tuple[Path, StubAgent]) -> Path:
    return observed[0]


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


def test_weights_are_bit_identical_without_our_callbacks(
    observed: tuple[Path, StubAgent], tmp_path: Path
) -> None:
    alone = fit(tmp_path, [])
    assert torch.equal(observed[1].policy.weight, alone.policy.weight)


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


def test_states_load_weights_only_and_a_resumed_run_has_the_curves_of_an_uninterrupted_one(
    run: Path, tmp_path: Path
) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    fit(tmp_path / "first", [*ours(), checkpoint], epochs=1)
    states = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert {"AEMMonitor", "StepTime", "Transcripts"} <= set(states)
    fit(tmp_path / "second", ours(), epochs=2, ckpt_path=tmp_path / "last.ckpt")
    drift = curve(tmp_path / "first", "aem/entropy_drift")
    drift |= curve(tmp_path / "second", "aem/entropy_drift")
    assert drift == curve(run, "aem/entropy_drift")
    resumed = json.loads((tmp_path / "second" / "step_time.json").read_text())
    assert resumed == json.loads((run / "step_time.json").read_text())


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

    make_trainer(tmp_path, ours(), epochs=1).fit(Silent(), two_batches(), two_batches())
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

    with pytest.raises(RuntimeError, match="broken"):
        make_trainer(tmp_path, ours(), epochs=1).fit(Breaks(), two_batches())
    assert json.loads((tmp_path / "step_time.json").read_text())["iterations"] == 1


# --- transcripts


def test_transcripts_hold_each_stage_at_its_iterations(run: Path) -> None:
    filed = [(line["stage"], line["iteration"]) for line in json_lines(run)]
    train = [("train", index) for index in (0, 0, 2, 2)]
    validate = [("validate", 1), ("validate", 3)]
    assert filed == [*train[:2], validate[0], *train[2:], validate[1]]


def test_a_turn_carries_the_advantage_and_alpha_of_its_own_response(run: Path) -> None:
    expected = {"game-0": (1.0, 1.5), "game-1": (-2.0, 1.25), "game-2": (0.0, 1.0)}
    lines = [line for line in json_lines(run) if line["stage"] == "train"]
    seen = {line["task"]: line["turns"][0] for line in lines if line["task"] in expected}
    assert seen
    for task, first in seen.items():
        assert (first["advantage"], first["alpha"]) == expected[task]


def test_a_validation_turn_has_its_own_entropy_and_no_advantage() -> None:
    first = episode_record(make_iteration(0).trajectories[0])["turns"][0]
    assert (first["entropy"], first["advantage"], first["alpha"]) == (0.25, None, None)


def test_the_choice_of_episodes_is_a_function_of_the_seed(tmp_path: Path) -> None:
    chosen = []
    for number, seed in enumerate((0, 0, 1, 2, 3)):
        folder = tmp_path / str(number)
        fit(folder, [Transcripts(episodes=2, every_n_iterations=1, seed=seed)], logger=False)
        chosen.append([(line["iteration"], line["task"]) for line in json_lines(folder)])
    assert chosen[0] == chosen[1]
    assert any(other != chosen[0] for other in chosen[2:])


def test_every_keeps_whole_groups_and_shows_loggers_the_sample_alone(tmp_path: Path) -> None:
    fit(tmp_path, [Transcripts(episodes=1, every_n_iterations=1, every=2)])
    lines = json_lines(tmp_path)
    train = [line for line in lines if line["stage"] == "train"]
    assert [line["iteration"] for line in train] == [0, 0, 0, 0, 1, 2, 2, 2, 2, 3]
    assert [(line["group"], line["copy"]) for line in train[:4]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert train[1]["turns"][0]["advantage"] == -2.0, "of its own trajectory"
    validated = [line for line in lines if line["stage"] == "validate"]
    assert len(validated) == 2 * 8, "both validations' two batches of four"
    texts = {tag for tag in events(tmp_path).Tags()["tensors"] if tag.startswith("transcripts/")}
    assert texts == {"transcripts/train_0/text_summary", "transcripts/validate_0/text_summary"}


def test_a_test_run_writes_its_episodes(tmp_path: Path) -> None:
    make_trainer(tmp_path, ours()).test(StubAgent(), two_batches(), verbose=False)
    assert [line["stage"] for line in json_lines(tmp_path)] == ["test"]


def test_a_line_cut_by_a_kill_is_dropped_and_whole_lines_stay(tmp_path: Path) -> None:
    path = tmp_path / "transcripts.jsonl"
    append_json_line(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": "half')
    append_json_line(path, {"a": 2})
    assert [line["a"] for line in json_lines(tmp_path)] == [1, 2]


def test_text_of_an_episode_never_acts_as_markup() -> None:
    trajectory = make_iteration(0).trajectories[0]
    hostile = "*x* [a](http://b) <script>alert(1)</script>"
    trajectory.turns[0].response = "```\n" + hostile + "\n\n# title"
    trajectory.turns[0].action = hostile
    page = markdown_to_safe_html(episode_markdown(episode_record(trajectory)))
    assert "<script" not in page
    assert "<a href" not in page
    assert "<em>" not in page
    assert "<h1>" not in page
    assert page.count("*x* [a](http://b) &lt;script&gt;alert(1)&lt;/script&gt;") == 2
    assert "&lt;think&gt;hm&lt;/think&gt;" in page


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    trajectory = make_iteration(0).trajectories[0]
    trajectory.turns[0].reward = float("nan")
    append_json_line(tmp_path / "transcripts.jsonl", episode_record(trajectory))
    line = json_lines(tmp_path)[0]
    assert line["returns"] is None
    assert line["turns"][0]["reward"] is None


def test_a_long_observation_is_cut_in_the_text_and_whole_in_the_record() -> None:
    trajectory = make_iteration(0).trajectories[0]
    trajectory.turns[0].observation = "y" * 50
    trajectory.reason = "a test fails"
    record = episode_record(trajectory)
    assert "a test fails" in episode_markdown(record)
    assert recorded_episode(record).reason == record["reason"] == "a test fails"
    assert record["turns"][0]["observation"] == "y" * 50
    assert "… 40 more characters" in episode_markdown(record, max_chars=10)


def test_transcripts_refuse_every_zero_iterations() -> None:
    for name in ("every_n_iterations", "every"):
        with pytest.raises(ValueError, match=f"Transcripts: {name} is 0; it must be 1 or more"):
            Transcripts(**{name: 0})


# --- adapter export


def test_the_exported_adapter_has_the_last_weights(observed: tuple[Path, StubAgent]) -> None:
    folder, agent = observed
    written = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert written == agent.policy.weight.tolist()
    assert not list(folder.glob("adapter.*"))


def test_the_adapter_is_exported_with_each_checkpoint(tmp_path: Path) -> None:
    export = AdapterExport(folder=tmp_path / "other")
    trainer = make_trainer(tmp_path, [export], logger=False)
    trainer.strategy.connect(StubAgent())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert (tmp_path / "other" / "adapter" / "adapter_config.json").is_file()


def test_an_export_that_fails_leaves_the_former_adapter_whole(tmp_path: Path) -> None:
    class Fails:
        def save_adapter(self, path: Path) -> None:
            (path / "adapter_config.json").write_text("half")
            raise OSError("disk full")

    path = tmp_path / "adapter"
    export_adapter(StubPolicy(), path)
    with pytest.raises(OSError, match="disk full"):
        export_adapter(Fails(), path)
    assert (path / "adapter_config.json").read_text() == "[0.0, 0.0, 0.0]"
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


def test_a_kill_between_the_renames_loses_no_adapter(tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    export_adapter(StubPolicy(), path)
    path.rename(tmp_path / "adapter.old")
    (tmp_path / "adapter.new").mkdir()
    recover(path)
    assert (path / "adapter_config.json").is_file()
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


def test_a_module_without_an_adapter_is_refused_before_training(tmp_path: Path) -> None:
    class Bare(StubAgent):
        def __init__(self) -> None:
            super().__init__()
            self.policy = torch.nn.Linear(1, 1)  # type: ignore[assignment]

    with pytest.raises(TypeError, match="Bare has none"):
        make_trainer(tmp_path, [AdapterExport()]).fit(Bare(), two_batches())
