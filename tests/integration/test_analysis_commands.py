"""The analyses as commands, on runs of the toy environment."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
from commands import Command, Ended
from runs import ROOT, curves, toy_overrides

SCRIPT = "src/aem_lightning/analysis/__main__.py"


class Analyses:
    """``python -m aem_lightning.analysis`` below one folder."""

    def __init__(self, root: Path, command: Command, model: str) -> None:
        self.root, self.command = root, command
        asked = [*toy_overrides(root, model), "iterations_per_epoch=1", "max_turns=3"]
        self.training = [entry for entry in asked if not entry.startswith(("experiment", "paths"))]

    def __call__(self, name: str, *overrides: str) -> Ended:
        return self.command(SCRIPT, name, f"paths.root_dir={self.root}", *overrides)

    def trained(self, name: str, *overrides: str) -> Ended:
        quoted = ", ".join(json.dumps(entry) for entry in self.training)
        return self(name, f"overrides=[{quoted}]", *overrides)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all tests of this file: later ones read the runs of the first."""
    return tmp_path_factory.mktemp("analyses")


@pytest.fixture
def analyses(
    toy_model: str, root: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> Analyses:
    monkeypatch.chdir(ROOT)
    return Analyses(root, command, toy_model)


@pytest.fixture
def compared(analyses: Analyses) -> Path:
    """The folder of a comparison of two arms over two seeds."""
    folder = analyses.root / "logs" / "compare" / "quickstart"
    if not (folder / "compare.json").is_file():
        ended = analyses.trained("compare", "seeds=[0,1]", "iterations=2")
        assert ended.status == 0, ended.said
    return folder


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def test_compare_pairs_other_runs_than_it_should(compared: Path) -> None:
    content = read(compared / "compare.json")
    assert [(run["arm"], run["seed"]) for run in content["runs"]] == [
        ("grpo", 0),
        ("grpo", 1),
        ("grpo_aem", 0),
        ("grpo_aem", 1),
    ]
    (pair,) = content["pairs"]
    assert (pair["base"], pair["arm"], pair["seeds"]) == ("grpo", "grpo_aem", [0, 1])
    rates = {(run["arm"], run["seed"]): run["success"]["all"] for run in content["runs"]}
    by_seed = [rates["grpo_aem", seed] - rates["grpo", seed] for seed in (0, 1)]
    assert pair["success"]["all"]["by_seed"] == pytest.approx(by_seed)
    assert pair["mcnemar"]["games"] == 16
    assert set(content["arms"]["grpo"]["success"]) == {"all", "red", "blue", "green", "white"}
    # A pair has one start: the same tasks, and the same responses before any update.
    first = {
        (run["arm"], run["seed"]): curves(Path(run["folder"]))["aem/entropy"][0]
        for run in content["runs"]
    }
    for seed in (0, 1):
        assert first["grpo", seed] == first["grpo_aem", seed]
    assert first["grpo", 0] != first["grpo", 1]


def test_compare_leaves_a_figure_a_table_and_curves_out(compared: Path) -> None:
    assert (compared / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert (compared / "compare.pdf").read_bytes().startswith(b"%PDF")
    content = read(compared / "compare.json")
    words = shlex.split(content["command"])
    assert words[:4] == ["python", "-m", "aem_lightning.analysis", "compare"]
    assert words[5:] == ["seeds=[0,1]", "iterations=2"], "no folder of this machine"
    assert all(0 <= run["before"] <= 1 for run in content["runs"])
    table = (compared / "compare.md").read_text()
    assert "| arm | seeds | blue | green | red | white | all |" in table
    assert "exact McNemar" in table
    names = curves(compared)
    assert "analysis/compare/grpo/success" in names
    assert "analysis/compare/grpo_aem_minus_grpo/entropy_early" in names


def test_a_finished_run_is_trained_again(compared: Path, analyses: Analyses) -> None:
    before = {path: path.stat().st_mtime_ns for path in compared.rglob("summary.json")}
    evaluated = {path: path.stat().st_mtime_ns for path in compared.rglob("evaluation.json")}
    same = ("seeds=[0,1]", "iterations=2", f"folder={compared}")
    ended = analyses.trained("compare", "name=again", *same)
    assert ended.status == 0, ended.said
    words = shlex.split(read(compared / "again.json")["command"])
    assert words[3] == "compare"
    assert "name=again" in words
    assert {path: path.stat().st_mtime_ns for path in compared.rglob("summary.json")} == before
    assert len(before) == len(evaluated) == 4
    after = {path: path.stat().st_mtime_ns for path in compared.rglob("evaluation.json")}
    assert after == evaluated


def test_a_run_of_other_overrides_is_taken_for_this_one(compared: Path, analyses: Analyses) -> None:
    ended = analyses.trained("compare", "seeds=[0,1]", "iterations=3")
    ended.assert_clear("then ['iterations=2'], now ['iterations=3']", "folder=")


def test_existing_runs_are_not_compared_without_training(
    compared: Path, analyses: Analyses, tmp_path: Path
) -> None:
    given = ", ".join(
        f"{arm}: [{','.join(str(compared / arm / f'seed_{seed}') for seed in (0, 1))}]"
        for arm in ("grpo", "grpo_aem")
    )
    ended = analyses("compare", f"runs={{{given}}}", "games=false", f"folder={tmp_path}")
    assert ended.status == 0, ended.said
    found, trained = read(tmp_path / "compare.json"), read(compared / "compare.json")
    assert found["experiment"] is None
    assert found["pairs"][0]["mcnemar"] is None
    assert found["arms"] == trained["arms"], "the last evaluation of a run is its summary's"


def test_the_proxy_cannot_be_measured_on_a_checkpoint(compared: Path, analyses: Analyses) -> None:
    checkpoint = compared / "grpo_aem" / "seed_0" / "checkpoints" / "last.ckpt"
    sizes = ("states=4", "samples=24", "tasks=4", "draws=200", "min_range=0.01")
    ended = analyses("proxy", f"ckpt={checkpoint}", *sizes)
    assert ended.status == 0, ended.said
    (path,) = analyses.root.glob("logs/proxy/*/proxy.json")
    content = read(path)
    assert (content["states"], content["samples"], content["iteration"]) == (4, 24, 2)
    sampled = content["sampled"]
    assert 1 <= sampled["states_ungated"] <= 4
    assert -1 <= sampled["pearson"]["low"] <= sampled["pearson"]["high"] <= 1
    assert sampled["compensator"]["value"] > 0.3, "S is its compensator plus a martingale"
    assert (path.parent / "proxy.png").is_file()
    assert "analysis/proxy/sampled_pearson" in curves(path.parent)


def test_the_cost_table_is_of_another_run(compared: Path, analyses: Analyses) -> None:
    run = compared / "grpo" / "seed_1"
    ended = analyses("cost", f"run={run}")
    assert ended.status == 0, ended.said
    (path,) = analyses.root.glob("logs/cost/*/cost.json")
    content = read(path)
    assert content["iterations"] == 2
    shares = {row["stage"]: row["share"] for row in content["stages"]}
    assert sum(value for stage, value in shares.items() if stage != "environment") == (
        pytest.approx(1.0)
    )
    assert (path.parent / "cost.md").read_text().startswith("| stage | seconds | share | paper |")


# One state, two branches of different entropy, neither worth more: what is left is the mask.
BRANCHES = (
    "datamodule=branches",
    "policy.model=null",
    "policy.warm_start.demonstrations=512",
    "policy.warm_start.epochs=20",
    "policy.warm_start.max_turns=1",
    "max_turns=1",
    "tasks_per_iteration=8",
    "group_size=16",
    "concurrency=128",
    "iterations_per_epoch=12",
    "update_epochs=1",
    "num_minibatches=1",
    "scheduler=constant",
    "optimizer.lr=3e-3",
    "loss.kl_coef=0",
    "evaluate=false",
)


def test_the_masked_runs_do_not_diverge(analyses: Analyses) -> None:
    analyses.training += BRANCHES
    ended = analyses.trained("masks", "iterations=12")
    assert ended.status == 0, ended.said
    folder = analyses.root / "logs" / "masks" / "quickstart" / "seed_0"
    content = read(folder / "masks.json")
    positive, negative = (content["entropy"][sign]["value"] for sign in ("positive", "negative"))
    assert len(positive) == len(negative) == 12
    assert positive[0] == negative[0], "one start"
    assert content["change_positive"] < -0.1
    assert content["change_negative"] > 0.1
    assert content["gap_end"] > 0.3
    assert (folder / "masks.png").is_file()
    assert curves(folder)["analysis/masks/gap_end"][0] == pytest.approx(content["gap_end"])


def test_an_interrupted_run_starts_anew(compared: Path, analyses: Analyses) -> None:
    run = compared / "grpo" / "seed_1"
    (run / "summary.json").unlink()
    trained = curves(run)["aem/entropy"]
    ended = analyses.trained("compare", "seeds=[0,1]", "iterations=2", "games=false")
    assert ended.status == 0, ended.said
    assert read(run / "summary.json")["iterations"] == 2
    assert len(list(run.glob("tensorboard/events*"))) >= 1
    assert curves(run)["aem/entropy"] == trained


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("prox",), "proxy|masks|compare|ablations|cost"),
        (
            ("compare", "arms=[grpo,none_such]"),
            "'none_such' is unknown; allowed: lag_0, lag_1, empg, repo_r, ",
        ),
        (("compare", "sed=[0]"), "All keys: python -m aem_lightning.analysis compare --cfg job"),
        (("cost", "run=nowhere"), "there is no step_time.json in it"),
        (("proxy", "ckpt=nowhere.ckpt"), "there is no such file"),
        (("proxy", "ckpt=last", "states=1"), "states=1: a whole number of at least 2"),
        (("compare", "runs={grpo: [nowhere]}"), "has no summary.json"),
    ],
)
def test_a_mistake_ends_without_what_to_type(
    arguments: tuple[str, ...], said: str, analyses: Analyses, tmp_path: Path
) -> None:
    analyses.root = tmp_path
    analyses(*arguments).assert_clear(said)
    assert os.getcwd() == str(ROOT)
