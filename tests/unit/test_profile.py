"""A profile: a trace that a browser opens, and the largest costs in words."""

import gzip
import json
import logging

import pytest
from local_coin import local_data, make_agent, make_trainer
from runs import composed
from test_agent_module import VariedRewards

from aem_lightning.callbacks import Profile
from aem_lightning.callbacks.profile import largest, stage_costs
from aem_lightning.modules.timing import STAGES
from aem_lightning.runner.build import build_trainer
from aem_lightning.runner.checks import ConfigError, check_config
from aem_lightning.runner.cli import accept_plus


def profiled(folder, epochs, agent=None, **limits):
    agent = agent or make_agent(rewards=VariedRewards())
    callback = Profile(iterations=1, folder=folder, **limits)
    make_trainer(epochs, callbacks=[callback]).fit(agent, datamodule=local_data())
    with gzip.open(folder / "profile.json.gz") as file:
        return json.load(file)["traceEvents"]


def test_a_trace_lacks_operators_or_stages(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "aem_lightning"):
        events = profiled(tmp_path, epochs=3)
    names = [event.get("name") for event in events]
    assert "aten::addmm" in names
    assert names.count("rollout") == names.count("update") == 1  # one iteration of three
    (line,) = (r.getMessage() for r in caplog.records if "Largest operators" in r.getMessage())
    assert line.startswith("Profile of the iterations [1]")  # the first one is a warm-up
    stages, operators = line.split("Largest stages: ")[1].split("\n  Largest operators: ")
    assert stages.count("%") == operators.count("%") == 3


def test_a_trace_of_one_iteration_is_none_or_grows_with_its_steps_and_micro_batches(tmp_path):
    agent = make_agent(rewards=VariedRewards())
    events = profiled(tmp_path, 1, agent, decode_steps=3, micro_batches=1)
    spans = {e["name"]: e for e in events if e.get("name") in STAGES}

    def within(stage, name):
        start = spans[stage]["ts"]
        end = start + spans[stage]["dur"]
        return sum(e.get("name") == name and start <= e["ts"] <= end for e in events)

    assert agent.engine.stats["decode_steps"] > 6
    assert within("rollout", "aten::searchsorted") == 3  # one a draw
    forward = "aten::embedding"
    assert within("ref_logprobs", forward) == within("update", forward) == 1
    of_stages = sum(within(stage, forward) for stage in spans)
    assert sum(e.get("name") == forward for e in events) == of_stages, "validation is recorded"


def test_the_environment_counts_twice():
    costs = stage_costs({"rollout": 6.0, "environment": 2.0, "update": 4.0})
    assert costs == {"rollout": 0.4, "environment": 0.2, "update": 0.4}
    assert largest({"a": 0.1, "b": 0.5, "c": 0.15, "d": 0.25}) == "b 50 %, d 25 %, c 15 %"


@pytest.mark.parametrize("typed", ["+profile=true", "profile=true"])
def test_a_way_to_type_it_is_refused(typed, tmp_path):
    (override,) = accept_plus([typed])
    quiet = ["callbacks=null", "logger=null"]
    output = f"paths.output_dir={tmp_path}"
    cfg = composed([override, output, *quiet, "trainer.accelerator=cpu"])
    cfg.profile_decode_steps = 5
    (profile,) = (c for c in build_trainer(cfg).callbacks if isinstance(c, Profile))
    assert profile.most == {"decode_step": 5, "micro_batch": 2}
    without = composed([output, *quiet, "trainer.accelerator=cpu"])
    assert Profile not in [type(callback) for callback in build_trainer(without).callbacks]


def test_another_plus_is_swallowed():
    assert accept_plus(["+seed=1", "++profile=true"]) == ["+seed=1", "++profile=true"]


def test_a_profile_of_a_word_is_taken_for_yes():
    with pytest.raises(ConfigError, match=r"profile='often': true or false"):
        check_config(composed(["profile=often"]))
