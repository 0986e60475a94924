"""What must not change the gradient of an iteration, and the ratio that must be exactly 1."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Keep, fit, toy_config, weights
from torch import Tensor

from aem_lightning.modules import AgentModule
from aem_lightning.types import Trajectory

ALONE = ("callbacks=null", "logger=null")
# With SGD at rate 1, without clipping, the weights move by minus the gradient.
ONE_STEP = (
    *ALONE,
    "+trainer.limit_val_batches=0",
    "iterations=1",
    "iterations_per_epoch=1",
    "update_epochs=1",
    "num_minibatches=1",
    "optimizer._target_=torch.optim.SGD",
    "optimizer.lr=1.0",
    "max_grad_norm=1e9",
    "scheduler=constant",
    "loss.kl_coef=0.1",
)


@pytest.fixture(scope="module")
def trajectories(toy_model: str, tmp_path_factory: pytest.TempPathFactory) -> list[Trajectory]:
    keep = Keep()
    fit(toy_config(tmp_path_factory.mktemp("played"), toy_model, *ONE_STEP), callbacks=[keep])
    return keep.iterations[0].trajectories


def gradient(
    cfg: Any, trajectories: list[Trajectory], dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], AgentModule]:
    """The gradient of one iteration on ``trajectories``, and the module after it.

    Both halves of the adapters are random: as they start, with B = 0, half of the gradient is 0.
    """
    start: dict[str, Tensor] = {}

    def prepare(module: AgentModule) -> None:
        generator = torch.Generator().manual_seed(0)
        for _, parameter in sorted(module.policy.trainable().items()):
            values = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(0.1 * values)
        module.policy.to(dtype)
        for name, parameter in module.policy.trainable().items():
            start[name] = parameter.detach().clone()
        module.collect = lambda tasks, watch: trajectories

    module = fit(cfg, prepare=prepare)
    moved = {name: start[name] - value for name, value in weights(module).items()}
    assert all(value.abs().max() > 0 for value in moved.values())
    return moved, module


def test_order_of_trajectories_changes_the_gradient(
    trajectories: list[Trajectory], toy_model: str, tmp_path: Path
) -> None:
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1)).tolist()
    renamed = {0: 2, 1: 0, 2: 3, 3: 1}
    shuffled = [replace(trajectories[i], group=renamed[trajectories[i].group]) for i in order]
    cfg = toy_config(tmp_path, toy_model, *ONE_STEP)
    expected, _ = gradient(cfg, trajectories)
    found, _ = gradient(cfg, shuffled)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_size_of_micro_batches_changes_the_gradient(
    trajectories: list[Trajectory], toy_model: str, tmp_path: Path
) -> None:
    one, module = gradient(
        toy_config(tmp_path, toy_model, *ONE_STEP, "micro_batch_tokens=100000"), trajectories
    )
    many, other = gradient(
        toy_config(tmp_path, toy_model, *ONE_STEP, "micro_batch_tokens=1"), trajectories
    )
    lengths = torch.tensor([len(row) for t in trajectories for row in t.rows])
    counts = [len(m.budget.cut(range(len(lengths)), lengths)) for m in (module, other)]
    assert counts == [1, len(trajectories)]
    torch.testing.assert_close(many, one, rtol=1e-4, atol=1e-6)


def test_a_transcript_row_trains_differently_from_its_turns(
    trajectories: list[Trajectory], toy_model: str, tmp_path: Path
) -> None:
    def by_turn(trajectory: Trajectory) -> Trajectory:
        rows = [trajectory.rows[t.row][: t.start + t.length] for t in trajectory.turns]
        turns = [replace(turn, row=i) for i, turn in enumerate(trajectory.turns)]
        return replace(trajectory, rows=rows, turns=turns)

    assert any(len(t.turns) > len(t.rows) == 1 for t in trajectories)
    cfg = toy_config(tmp_path, toy_model, *ONE_STEP)
    expected, _ = gradient(cfg, trajectories, torch.float64)
    found, _ = gradient(cfg, [by_turn(t) for t in trajectories], torch.float64)
    # Not closer: the norms of the model compute in float32 whatever the weights are.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("update_epochs", "num_minibatches"), [(1, 1), (2, 3)])
def test_the_first_ratio_is_not_one(
    update_epochs: int, num_minibatches: int, toy_model: str, tmp_path: Path
) -> None:
    updates: list[list[Tensor]] = []  # an entry an optimizer step, in it one a micro-batch

    def record(module: AgentModule) -> None:
        loss, update = module.loss, module.update

        class Recording:
            def __getattr__(self, name: str) -> Any:
                return getattr(loss, name)

            def __call__(self, logprobs: Tensor, old: Tensor, *rest: Any) -> Any:
                log_ratios.append((logprobs - old).detach().abs().max())
                return loss(logprobs, old, *rest)

        log_ratios: list[Tensor] = []

        def updating(batch: Any, advantages: Tensor, plan: Any) -> dict[str, float]:
            log_ratios.clear()
            metrics = update(batch, advantages, plan)
            values = iter(log_ratios)
            cut = [module.budget.cut(step.active, batch.row_length) for step in plan.steps]
            updates.append([torch.stack([next(values) for _ in step]).max() for step in cut])
            if len(plan.steps) == 1:
                assert metrics["policy/approx_kl"] == metrics["policy/clip_fraction"] == 0
            return metrics

        module.loss, module.update = Recording(), updating

    sizes = (f"update_epochs={update_epochs}", f"num_minibatches={num_minibatches}")
    cfg = toy_config(tmp_path, toy_model, *ALONE, *sizes, "micro_batch_tokens=64")
    fit(cfg, prepare=record)
    assert len(updates) == 4
    for steps in updates:
        assert steps[0] == 0
        assert all(later > 0 for later in steps[1:])
        assert len(steps) == update_epochs * num_minibatches
