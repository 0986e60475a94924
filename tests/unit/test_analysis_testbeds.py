"""The interaction of two settings, and the forecast beside the measured sign."""

from __future__ import annotations

import json

import pytest
from omegaconf import OmegaConf

from aem_lightning.analysis import testbeds as module
from aem_lightning.analysis.inputs import check_testbeds
from aem_lightning.analysis.testbeds import interaction
from aem_lightning.runner.checks import ConfigError


def report(folder, differences, forecasts):
    """What `compare` leaves of an arm with these differences by seed, and its base's summaries."""
    runs = []
    for seed, forecast in enumerate(forecasts):
        run = folder / f"seed_{seed}"
        run.mkdir(parents=True)
        (run / "summary.json").write_text(json.dumps({"forecast": forecast}))
        curves = {"train/success_rate": {"value": [0.1] * 9 + [0.4 + seed] * 5}}
        runs.append({"arm": "grpo", "seed": seed, "folder": str(run), "curves": curves})
    mean = sum(differences) / len(differences)
    value = {"value": mean, "low": mean, "high": mean, "p_sign_flip": 0.5, "by_seed": differences}
    seeds = list(range(len(differences)))
    pair = {"base": "grpo", "arm": "grpo_aem", "seeds": seeds, "train_success": value}
    return {"runs": runs, "pairs": [pair]}


def test_the_interaction_is_of_the_same_seeds():
    pair = {"arm": "x", "seeds": [0, 1, 3]}
    one = {"pairs": [{**pair, "train_success": {"by_seed": [0.1, 0.2, 0.3]}}]}
    other = {"pairs": [{"arm": "x", "seeds": [1, 3], "train_success": {"by_seed": [0.1, -0.1]}}]}
    found = interaction(one, other, arm="x")
    assert found["by_seed"] == pytest.approx([0.1, 0.4])
    assert found["value"] == pytest.approx(0.25)
    assert found["p_sign_flip"] == 0.5  # of two seeds the least possible


def config(folder, **changes):
    settings = {"up": {"experiment": "corridor"}, "down": {"experiment": "corridor"}}
    given = {
        "name": "testbeds",
        "arms": ["grpo", "grpo_aem"],
        "arm": "grpo_aem",
        "arm_overrides": {},
        "seeds": [0],
        "settings": settings,
        "opposite": ["up", "down"],
        "jobs": 2,
        "folder": str(folder),
        "paths": {"root_dir": ".", "data_dir": ".", "log_dir": ".", "output_dir": "."},
    }
    return OmegaConf.create(given | changes)


def test_a_forecast_is_held_against_the_sign_that_was_measured(tmp_path, monkeypatch):
    made = {
        "up": report(tmp_path / "a", [0.05, 0.04], [-0.4, -0.2]),
        "down": report(tmp_path / "b", [0.02, 0.04], [0.5, None]),
    }

    def compare(cfg, name, setting):
        (tmp_path / name).mkdir()
        (tmp_path / name / "compare.json").write_text(json.dumps(made[name]))
        return 0

    monkeypatch.setattr(module, "_compare", compare)
    found = module.testbeds(config(tmp_path))
    assert found["settings"]["up"]["forecast"] == pytest.approx(-0.3)
    assert [each["called_right"] for each in found["settings"].values()] == [True, False]
    table = (tmp_path / "testbeds.md").read_text()
    assert "| up | grpo_aem − grpo | 2 | +4.5 [+4.5, +4.5], p = 0.500 | -0.30 | True |" in table
    assert "| down | grpo | 90.0 % | 1 of 2 [9 %, 91 %] |" in table  # 40 and 140 %
    assert "Interaction, up − down: +1.5" in table
    assert (tmp_path / "testbeds.png").is_file()


def test_a_setting_that_fails_is_named_when_the_others_have_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_compare", lambda cfg, name, setting: int(name == "up"))
    with pytest.raises(RuntimeError, match=r"^up: see "):
        module.testbeds(config(tmp_path))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"opposite": ["up", "left"]}, r"opposite=\['up', 'left'\]"),
        ({"arms": ["grpo"]}, r"settings\.up: arms=\['grpo'\]"),
        ({"settings": {"up": {}, "down": {}}}, r"settings\.up\.experiment"),
        ({"jobs": 0}, r"jobs=0"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, changes, key):
    with pytest.raises(ConfigError, match=key):
        check_testbeds(config(tmp_path, **changes))
