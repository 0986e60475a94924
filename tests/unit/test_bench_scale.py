"""The simulation of an iteration on many GPUs: what it must say where the answer is known."""

from __future__ import annotations

import json

import pytest

STAGES = ("--rollout", "210", "--score", "150", "--update", "285")


@pytest.fixture
def scale(import_benchmark):
    return import_benchmark("scale")


def test_one_gpu_takes_other_seconds_than_were_measured(scale, tmp_path):
    seconds = {"rollout": 420.0, "environment": 7.0, "old_logprobs": 300.0, "update": 570.0}
    rows = [{"stage": stage, "seconds": value} for stage, value in seconds.items()]
    measured = {"iterations": 2, "stages": rows}
    (tmp_path / "step_time.json").write_text(json.dumps(measured), encoding="utf-8")
    options = scale.parsed(["--run", str(tmp_path)])
    took, waited = scale.iteration(options, 1)
    assert took == pytest.approx(210 + 150 + 285, rel=1e-6)
    assert waited == pytest.approx(0.0, abs=1e-9)


def test_episodes_of_one_length_do_not_share_out_evenly(scale):
    even = [*STAGES, "--spread", "0", "--fixed", "0", "--adapter-mb", "0"]
    for gpus in (2, 4, 8, 16):
        took, waited = scale.iteration(scale.parsed(even), gpus)
        assert (took * gpus, waited) == (pytest.approx(645, rel=1e-6), pytest.approx(0, abs=1e-9))


def test_waiting_links_and_steps_cost_nothing(scale):
    base, _ = scale.iteration(scale.parsed(STAGES), 8)
    for more in (["--fixed", "0.8"], ["--spread", "1"], ["--frozen-gb", "60"], ["--steps", "4000"]):
        assert scale.iteration(scale.parsed([*STAGES, *more]), 8)[0] > base
    beside = scale.iteration(scale.parsed([*STAGES, "--engine-speed", "4"]), 8, servers=4)[0]
    assert beside < scale.iteration(scale.parsed(STAGES), 8, servers=4)[0]
