from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from callback_stubs import (
    StubAgent,
    StubPolicy,
    fit,
    json_lines,
    make_iteration,
    make_trainer,
    ours,
)
from tensorboard.plugin_util import markdown_to_safe_html

from aem_lightning.callbacks import AdapterExport, Transcripts
from aem_lightning.callbacks.adapter_export import export_adapter, recover
from aem_lightning.callbacks.transcripts import (
    append_json_line,
    episode_markdown,
    episode_record,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    fit(folder, ours())
    return folder


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


def test_a_test_run_writes_its_episodes(tmp_path: Path) -> None:
    loader = torch.utils.data.DataLoader(torch.zeros(2, 1))
    make_trainer(tmp_path, ours()).test(StubAgent(), loader, verbose=False)
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
    record = episode_record(trajectory)
    assert record["turns"][0]["observation"] == "y" * 50
    assert "… 40 more characters" in episode_markdown(record, max_chars=10)


def test_transcripts_refuse_every_zero_iterations() -> None:
    with pytest.raises(ValueError, match="every_n_iterations is 0; it must be 1 or more"):
        Transcripts(every_n_iterations=0)


# --- adapter export


def test_the_exported_adapter_has_the_last_weights(tmp_path: Path) -> None:
    agent = fit(tmp_path, ours())
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written == agent.policy.weight.tolist()
    assert not list(tmp_path.glob("adapter.*"))


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

    loader = torch.utils.data.DataLoader(torch.zeros(2, 1))
    with pytest.raises(TypeError, match="Bare has none"):
        make_trainer(tmp_path, [AdapterExport()]).fit(Bare(), loader)
