"""The parts of the analyses, without a run."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from matplotlib.text import Text
from omegaconf import OmegaConf
from PIL import Image
from runs import ROOT, composed
from torch import Tensor

from aem_lightning.algorithms import AEM, GRPO
from aem_lightning.analysis.__main__ import ANALYSES
from aem_lightning.analysis.compare import (
    Run,
    arm_statistics,
    base_of,
    comparison,
    effects,
    pair_statistics,
)
from aem_lightning.analysis.curves import mean_curve
from aem_lightning.analysis.keep import Keep
from aem_lightning.analysis.masks import divergence
from aem_lightning.analysis.picture import caption_of, draw_comparison, title_of
from aem_lightning.analysis.proxy import columns, played_statistics, sampled_statistics
from aem_lightning.analysis.report import Picture, need_matplotlib
from aem_lightning.analysis.sampling import PlayedState, ProxySettings
from aem_lightning.analysis.tables import comparison_markdown
from aem_lightning.analysis.training import arm_overrides, quoted
from aem_lightning.rollout import pack
from aem_lightning.types import RolloutBatch, Task, Trajectory, Turn

# ------------------------------------------------------------------------------------------- masks


def batch() -> RolloutBatch:
    """One group of four one-response trajectories: entropies 0.2, 0.4, 0.6, 0.8; two are won."""
    trajectories = []
    for copy, (entropy, reward) in enumerate([(0.2, 1.0), (0.4, 0.0), (0.6, 1.0), (0.8, 0.0)]):
        turn = Turn("o", (), "r", "a", 0, 1, [-0.5, -0.5], [entropy] * 2, reward=reward)
        trajectories.append(Trajectory(Task("t"), 0, copy, [turn], [[1, 2, 3]]))
    return pack(trajectories)


@pytest.mark.parametrize(
    ("sign", "kept"),
    [("positive", [True, False, False, True]), ("negative", [False, True, True, False])],
)
def test_a_mask_keeps_a_response_of_the_other_sign(sign: str, kept: list[bool]) -> None:
    data = batch()
    advantages = GRPO()(data)
    plain = AEM()(data).apply(advantages, data)
    masked = Keep(AEM(), sign)(data).apply(advantages, data)  # type: ignore[arg-type]
    assert (masked != 0).tolist() == kept
    assert torch.equal(masked, torch.where(torch.tensor(kept), plain, torch.zeros(4)))


def test_the_two_masks_leave_a_response_out() -> None:
    data = batch()
    advantages = GRPO()(data)
    both: Tensor = sum(Keep(AEM(), sign)(data).apply(advantages, data) for sign in SIGNS)  # type: ignore
    assert torch.equal(both, AEM()(data).apply(advantages, data))


SIGNS = ("positive", "negative")


def test_an_unknown_sign_is_taken() -> None:
    with pytest.raises(ValueError, match="allowed: positive, negative"):
        Keep(AEM(), "both")  # type: ignore[arg-type]


def test_divergence_has_the_wrong_sign() -> None:
    falls, rises = ([0, 1, 2, 3], [1.0, 0.9, 0.6, 0.4]), ([0, 1, 2, 3], [1.0, 1.1, 1.3, 1.5])
    found = divergence(falls, rises)
    assert found == pytest.approx({"change_positive": -0.5, "change_negative": 0.4, "gap_end": 0.9})


# ------------------------------------------------------------------------------------------- proxy

# States of samples (length, S, Λ).
TRUE = [[(2, 2.0 + d, 2.0 + d) for d in (-1.0, -0.5, 0.5, 1.0)] for _ in range(3)]


def test_a_perfect_proxy_has_another_sign() -> None:
    found = sampled_statistics(columns(TRUE), ProxySettings(states=3, samples=4, draws=100))
    assert found["pearson"]["value"] > 0.97
    assert found["compensator"]["value"] == pytest.approx(1.0)
    assert found["states_agreeing"] == found["states_ungated"] == 3
    assert found["length"]["value"] is None, "lengths do not vary"


def test_a_states_own_level_counts_as_correlation() -> None:
    # Surprisal and compensator differ between states only: within a state nothing correlates.
    levels = [[(2, level, level) for _ in range(4)] for level in (1.0, 5.0, 9.0)]
    found = sampled_statistics(columns(levels), ProxySettings(states=3, samples=4, draws=100))
    assert found["compensator"]["value"] is None
    assert found["states_ungated"] == 0


def test_length_explains_what_the_mean_has_lost() -> None:
    # Each token carries 1 nat: S and Λ grow with the length, the mean entropy does not.
    rows = [[(n, float(n), float(n)) for n in (1, 2, 3, 4)]] * 3
    found = sampled_statistics(columns(rows), ProxySettings(states=3, samples=4, draws=100))
    assert found["states_ungated"] == 0
    assert found["length"]["value"] == pytest.approx(1.0)
    assert found["compensator"]["value"] == pytest.approx(1.0)
    # So of the three proxies the paper's alone sees nothing.
    assert found["mean_entropy"]["value"] is None
    assert found["entropy_sum"]["value"] > 0.95
    assert found["relative_surprisal"]["value"] > 0.95
    assert found["one_token_share"] == 0.25


def test_a_gated_state_enters_the_played_statistics() -> None:
    met = [
        PlayedState([1], surprisal=1.0, alpha=1.2),  # less surprising than its state's mean of 2
        PlayedState([2], surprisal=3.0, alpha=0.7),
        PlayedState([3], surprisal=9.0, alpha=1.0),
    ]
    found = played_statistics(met, columns(TRUE), ProxySettings(states=3, samples=4, draws=100))
    assert found["states_ungated"] == found["states_agreeing"] == 2
    assert found["pearson"]["value"] == pytest.approx(1.0)


def test_sizes_without_a_statistic_are_taken() -> None:
    with pytest.raises(ValueError, match=r"states=1.*draws=5"):
        ProxySettings(states=1, draws=5)


# ----------------------------------------------------------------------------------------- compare


def run(arm: str, seed: int, rate: float, games: dict[str, bool]) -> Run:
    curves = {"aem/entropy": ([0, 1, 2], [rate, rate, 2 * rate])}
    return Run(arm, seed, Path("x"), {"all": rate, "pick_and_place_simple": rate}, curves, games)


def pair() -> dict[str, object]:
    runs = [
        run("grpo", 0, 0.50, {"a": True, "b": False, "c": False}),
        run("grpo", 1, 0.60, {"a": True, "b": True, "c": False}),
        run("grpo", 7, 0.10, {"a": False}),
        run("grpo_aem", 0, 0.55, {"a": True, "b": True, "c": False}),
        run("grpo_aem", 1, 0.75, {"a": False, "b": True, "c": True}),
    ]
    return pair_statistics(runs, "grpo", "grpo_aem", draws=100)


def test_a_seed_of_one_arm_alone_counts() -> None:
    found = pair()
    assert found["seeds"] == [0, 1]
    success = found["success"]["all"]  # type: ignore[index]
    assert success["value"] == pytest.approx(0.10)
    assert success["by_seed"] == pytest.approx([0.05, 0.15])
    assert success["p_sign_flip"] == 0.5
    assert found["entropy_early"]["value"] == pytest.approx(0.10)  # type: ignore[index]
    assert found["entropy_late"]["value"] == pytest.approx(0.20)  # type: ignore[index]


def test_games_are_paired_with_another_seeds() -> None:
    assert pair()["mcnemar"] == {"games": 6, "gained": 2, "lost": 1, "p": 1.0}


def test_an_arm_is_paired_with_another_estimators_base() -> None:
    arms = ["grpo", "gigpo", "gigpo_aem", "reversed"]
    assert [base_of(arm, arms) for arm in arms] == ["grpo", "grpo", "gigpo", "grpo"]


def test_the_picture_leaves_out_what_a_reader_has_to_know(tmp_path: Path) -> None:
    runs = []
    for arm, rates in (("grpo", (0.5, 0.6)), ("grpo_aem", (0.55, 0.75))):
        for seed, rate in enumerate(rates):
            values = [rate - 0.2, rate]
            curves = {tag: ([0, 1], values) for tag in ("train/success_rate", "aem/entropy")}
            curves["val/success_rate"] = ([1], [rate])
            runs.append(Run(arm, seed, Path("x"), {"all": rate}, curves, {}, before=0.3))
    command = 'python -m aem_lightning.analysis compare \'overrides=["a=${b}","c=${d"]\''
    content = json.loads(json.dumps(comparison(runs, 100, experiment="toy", command=command)))
    figure = draw_comparison(content)
    said = [text.get_text() for text in figure.findobj(Text)]
    for legend, panels in (
        ("grpo (2 seeds, 95 % interval)", 3),
        ("grpo_aem (2 seeds, 95 % interval)", 3),
        ("all evaluation games, before (at 0) and after training", 1),
        ("grpo_aem against grpo on toy", 1),
    ):
        assert said.count(legend) == panels, legend
    assert "after training: +10.0 [−53.5, +73.5], p = 0.5, 2 seeds" in said
    assert "2 pairs can give no less than 0.5" in " ".join(said[-1].split())
    for axes in figure.axes:
        assert axes.get_title()
        assert axes.get_xlabel()
    written = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        again = draw_comparison(content)
        Picture(again, title_of(content), caption_of(content)).save(folder, "compare")
        written.append([(folder / f"compare.{kind}").read_bytes() for kind in ("png", "pdf")])
    assert written[0] == written[1]
    assert written[0][1].startswith(b"%PDF")
    assert Image.open(tmp_path / "a" / "compare.png").text["Description"].endswith(command)


def test_a_picture_of_a_single_run_is_none() -> None:
    alone = comparison([run("grpo", 0, 0.5, {})], 100)
    said = [text.get_text() for text in draw_comparison(alone).findobj(Text)]
    assert "no seed that two arms have" in said
    assert "grpo (1 seed)" in said


def test_the_table_is_not_in_the_papers_order() -> None:
    rate = {"value": 0.5, "low": 0.4, "high": 0.6, "count": 2}
    kinds = ("all", "look_at_obj_in_light", "pick_and_place_simple", "zoo")
    content = {
        "runs": [{"arm": "grpo"}, {"arm": "grpo"}],
        "arms": {"grpo": {"success": dict.fromkeys(kinds, rate), "effects": effects([])}},
        "pairs": [],
    }
    text = comparison_markdown(content)
    assert "| arm | seeds | Pick | Look | zoo | all |" in text
    assert text.count("50.0 [40.0, 60.0]") == 4


def test_arms_that_played_no_evaluation_games_are_a_table_of_dashes() -> None:
    runs = [
        Run(arm, seed, Path(), {}, {"train/success_rate": ([0, 1], [rate, rate + 0.2])}, {})
        for arm, rate in (("grpo", 0.3), ("grpo_aem", 0.4))
        for seed in (0, 1)
    ]
    text = comparison_markdown(comparison(runs, 100))
    assert text.startswith("Success in training, all iterations (%), mean over seeds")
    assert "| grpo | 2 | 40.0 [40.0, 40.0] |" in text
    assert "| *grpo_aem − grpo* | 2 | +10.0 [+10.0, +10.0] |" in text


def test_the_effects_of_an_arm_are_no_means_over_iterations_and_runs() -> None:
    def run(seed: int, gated: list[float], up: list[float], down: list[float]) -> Run:
        curves = {
            "aem/gated_groups": (list(range(len(gated))), gated),
            "aem/mass_base_positive": ([0, 1], up),
            "aem/mass_base_negative": ([0, 1], down),
        }
        return Run("grpo", seed, Path(), {}, curves, {})

    runs = [run(0, [0.0, 1.0], [1.0, 0.0], [3.0, 0.0]), run(1, [0.5, 0.9], [3.0, 1.0], [1.0, 1.0])]
    found = effects(runs)
    assert found["aem/gated_groups"] == pytest.approx(0.6)
    assert found["positive_share_base"] == pytest.approx(0.5), "an iteration of zeros has no share"
    assert found["aem/alpha_min"] is None
    shown = comparison_markdown(
        {"runs": [], "arms": {"grpo": {"success": {}, "effects": found}}, "pairs": []}
    )
    assert "| groups whose α is 1 (%) | 60 |" in shown
    assert "| least α of an iteration | – |" in shown


def test_a_seed_that_never_won_is_no_seed_of_its_arm() -> None:
    curves = [{"val/success_rate": ([0, 1], [rate, rate])} for rate in (0.0, 0.0, 0.6)]
    runs = [Run("grpo", seed, Path(), {}, curve, {}) for seed, curve in enumerate(curves)]
    found = arm_statistics(runs)["val_success"]
    assert (found["value"], found["count"]) == (pytest.approx(0.2), 3)


def test_a_mean_curve_has_points_that_a_run_lacks() -> None:
    xs, found = mean_curve([([0, 1, 2], [1.0, 2.0, 3.0]), ([0, 2], [3.0, 5.0])])
    assert xs == [0, 2]
    assert [point.value for point in found] == [2.0, 4.0]


# -------------------------------------------------------------------------------------------- arms


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    return composed([*ANALYSES["ablations"].settings], "analysis/compare")


def test_an_arm_is_another_algorithm_or_modulation(options) -> None:
    assert arm_overrides(options, "dapo") == ["algorithm=dapo", "modulation=none"]
    assert arm_overrides(options, "gigpo_aem") == ["algorithm=gigpo", "modulation=aem"]
    assert arm_overrides(options, "empg_aem") == ["algorithm=empg", "modulation=empg_aem"]


def test_the_arm_that_an_error_suggests_is_no_valid_override() -> None:
    with pytest.raises(ValueError, match="none_such") as caught:
        arm_overrides(OmegaConf.create({"arm_overrides": {}}), "none_such")
    (typed,) = shlex.split(str(caught.value).split("what it changes: ")[1])
    (parsed,) = OverridesParser.create().parse_overrides([typed])
    assert parsed.key_or_group == "arm_overrides.none_such"
    assert [str(item) for item in parsed.value()] == ["modulation=aem", "modulation.sharpness=2"]


def test_an_arm_says_what_no_config_knows(options) -> None:
    for arm in (*options.arm_overrides, "dapo", "gigpo_aem", "grpopp", "ppo_aem"):
        overrides = arm_overrides(options, arm)
        cfg = composed(["experiment=quickstart", *overrides, "paths.output_dir=x"])
        assert cfg.datamodule.root.endswith("quickstart"), "an arm is not another experiment"


def test_the_ablations_of_the_config_are_one_arm_twice(options) -> None:
    seen = [OmegaConf.to_yaml(OmegaConf.create(arm_overrides(options, a))) for a in options.arms]
    assert len(set(seen)) == len(options.arms) >= 6


def test_a_path_breaks_the_override_grammar() -> None:
    path = "/a b/it's=1,[x]\\y"
    assert composed([f"name={quoted(path)}", "paths.output_dir=x"]).name == path


def test_a_missing_matplotlib_shows_after_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'aem-lightning\[notebooks\]'"):
        need_matplotlib()
