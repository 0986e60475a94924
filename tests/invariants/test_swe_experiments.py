"""The SWE experiments: they compose, keep DeepSWE's settings, and train through a sandbox."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import Machine, some_machines
from jinja2 import Template
from runs import Keep, built, composed, equal_bits, weights

from aem_lightning.algorithms import RLOO
from aem_lightning.envs.swe.sandbox import BubblewrapSandbox
from aem_lightning.envs.swe.sandbox.remote import TOKEN
from aem_lightning.modules import AgentModule
from aem_lightning.runner.build import check_parts
from aem_lightning.runner.checks import check_config

PLACES = ("paths.output_dir=.", "paths.root_dir=.")


def test_the_settings_are_not_deepswes() -> None:
    cfg = composed(["experiment=swe", *PLACES])
    assert cfg.name == "swe_grpopp_aem"
    assert (cfg.tasks_per_iteration, cfg.group_size, cfg.max_turns) == (8, 8, 50)
    assert cfg.max_context == 4_096 + 32_768
    assert cfg.memory == "transcript"
    assert cfg.temperature == 1.0
    assert cfg.compact_filtering
    assert cfg.advantage._target_.endswith(".RLOO")
    assert (cfg.loss.clip_low, cfg.loss.clip_high) == (0.2, 0.28)
    assert (cfg.loss.kl_coef, cfg.loss.entropy_coef) == (0.0, 0.0)
    assert cfg.loss.aggregation == "constant"  # no length normalisation
    assert (cfg.rewards.success, cfg.rewards.malformed, cfg.rewards.step) == (1.0, 0.0, 0.0)
    assert cfg.datamodule.environment.limits.wall_s == 90
    assert cfg.datamodule.environment.grade_s == 300
    assert cfg.datamodule.environment.episode_s == 5400
    assert cfg.datamodule.workers == cfg.concurrency == 64


def test_the_transcript_of_a_reasoning_model_is_rewritten_by_its_template() -> None:
    template = Template(composed(["experiment=swe", *PLACES]).policy.chat_template)
    talk = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "<think>why</think>two"},
        {"role": "user", "content": "three"},
    ]
    asked = template.render(messages=talk[:1], add_generation_prompt=True)
    answered = template.render(messages=talk[:2], add_generation_prompt=False)
    assert answered == f"{asked}<think>why</think>two<|im_end|>\n"
    assert template.render(messages=talk, add_generation_prompt=True).startswith(answered)


@pytest.mark.parametrize("experiment", ["swe", "swe_quickstart"])
def test_a_swe_experiment_cannot_be_made(
    experiment: str, toy_model: str, swe_root: Path, tmp_path: Path
) -> None:
    data = [] if experiment == "swe_quickstart" else ["datamodule=swe_embedded"]
    cfg = composed(
        [
            f"experiment={experiment}",
            *data,
            f"datamodule.root={swe_root}",
            "datamodule.evaluation_splits=[valid_seen]",
            "datamodule.environment.allow_unsafe=true",
            f"policy.model={toy_model}",
            "policy.chat_template=null",
            f"paths.root_dir={tmp_path}",
            f"paths.output_dir={tmp_path}",
            "trainer.accelerator=cpu",
        ]
    )
    check_config(cfg)
    check_parts(cfg)
    with built(cfg) as (trainer, module, datamodule):
        assert isinstance(module, AgentModule)
        assert isinstance(module.estimator, RLOO) == (experiment != "swe_quickstart")
        assert trainer.max_epochs * cfg.iterations_per_epoch == cfg.iterations
        assert len(datamodule.tasks("train")) == 2


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Machine]]:
    """Two machines that run sandboxes, in bubblewrap where it works."""
    sandbox = "bubblewrap" if BubblewrapSandbox().probe().usable else "local"
    with some_machines(monkeypatch) as start:
        yield [start(sandbox=sandbox) for _ in range(2)]


@pytest.mark.slow
def test_a_tiny_policy_does_not_learn_from_bugs_in_sandboxes_of_other_hosts(
    swe_root: Path, tmp_path: Path, hosts: list[Machine]
) -> None:
    """Warm start and one iteration on two instances; every edit and every grade is a real one."""
    cfg = composed(
        [
            "experiment=swe_quickstart",
            f"datamodule.root={swe_root}",
            "datamodule.evaluation_splits=[valid_seen]",
            "datamodule.environment.sandbox=remote",
            f"datamodule.environment.hosts=[{','.join(host.address for host in hosts)}]",
            f"datamodule.pass_environment=[{TOKEN}]",
            "datamodule.workers=2",
            *(f"policy.architecture.{name}" for name in ("hidden_size=64", "num_hidden_layers=2")),
            "policy.warm_start.demonstrations=16",
            "policy.warm_start.epochs=12",
            "policy.warm_start.lr=1e-2",
            "policy.warm_start.batch_tokens=512",
            "action=constrained",
            "temperature=2.0",  # it knows both fixes: now and then it has to miss
            "iterations=1",
            "iterations_per_epoch=1",
            "tasks_per_iteration=2",
            "group_size=4",
            "callbacks=null",
            "logger=null",
            "+trainer.limit_val_batches=0",
            f"paths.root_dir={tmp_path}",
            f"paths.output_dir={tmp_path}",
        ]
    )
    with built(cfg) as (trainer, module, datamodule):
        keep = Keep()
        trainer.callbacks.append(keep)
        before = weights(module)
        trainer.fit(module, datamodule=datamodule)
        (done,) = keep.iterations
        assert len(done.trajectories) == 8
        assert not any(trajectory.infra_error for trajectory in done.trajectories)
        assert any(trajectory.won for trajectory in done.trajectories)
        assert done.skipped is None
        assert not equal_bits(before, weights(module))
