"""What must not move a single bit of the trained weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from runs import Keep, built, curves, equal_bits, fit, toy_config, weights
from torch import Tensor

from aem_lightning.types import Iteration


@pytest.fixture(scope="module")
def base(toy_model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Weights of the plain run: AEM, every callback."""
    return weights(fit(toy_config(tmp_path_factory.mktemp("base"), toy_model)))


@pytest.fixture(scope="module")
def none(
    toy_model: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Tensor], list[Iteration]]:
    return recorded(toy_config(tmp_path_factory.mktemp("none"), toy_model, "modulation=none"))


def recorded(cfg: DictConfig) -> tuple[dict[str, Tensor], list[Iteration]]:
    """The weights after a run, and its iterations."""
    keep = Keep()
    return weights(fit(cfg, callbacks=[keep])), keep.iterations


def test_no_modulation_differs_from_sharpness_zero(
    none: tuple[dict[str, Tensor], list[Iteration]], toy_model: str, tmp_path: Path
) -> None:
    zero, with_aem = recorded(
        toy_config(tmp_path, toy_model, "modulation=aem", "modulation.sharpness=0.0")
    )
    assert equal_bits(none[0], zero)
    assert len(none[1]) == len(with_aem) == 4
    for iteration in with_aem:
        assert iteration.advantages.abs().sum() > 0
        assert iteration.metrics["policy/grad_norm"] > 0


def test_modulation_or_updates_do_nothing(
    base: dict[str, Tensor],
    none: tuple[dict[str, Tensor], list[Iteration]],
    toy_model: str,
    tmp_path: Path,
) -> None:
    with built(toy_config(tmp_path / "fresh", toy_model)) as (_, module, _):
        fresh = weights(module)
    assert base.keys() == fresh.keys()
    for name in base:
        assert not torch.equal(base[name], fresh[name]), f"{name} was never updated"
    assert not equal_bits(base, none[0])


def test_callbacks_move_the_weights(
    base: dict[str, Tensor], toy_model: str, tmp_path: Path
) -> None:
    cfg = toy_config(tmp_path, toy_model, "callbacks=null", "logger=null")
    assert equal_bits(base, weights(fit(cfg)))


def test_the_same_command_gives_other_weights(
    base: dict[str, Tensor], toy_model: str, tmp_path: Path
) -> None:
    assert equal_bits(base, weights(fit(toy_config(tmp_path, toy_model))))


def test_the_seed_is_not_used(base: dict[str, Tensor], toy_model: str, tmp_path: Path) -> None:
    assert not equal_bits(base, weights(fit(toy_config(tmp_path, toy_model, "seed=1"))))


def test_concurrency_moves_the_weights(toy_model: str, tmp_path: Path) -> None:
    few, iterations = recorded(toy_config(tmp_path, toy_model, "concurrency=5", "iterations=2"))
    many, others = recorded(toy_config(tmp_path / "b", toy_model, "iterations=2"))
    first, other = iterations[0], others[0]
    assert [t.rows for t in first.trajectories] == [t.rows for t in other.trajectories]
    # Logits are rounded by the size of the batch that they were computed in.
    torch.testing.assert_close(few, many, rtol=1e-3, atol=1e-4)


def test_an_evaluation_moves_the_training(
    base: dict[str, Tensor], toy_model: str, tmp_path: Path
) -> None:
    with built(toy_config(tmp_path, toy_model)) as (trainer, module, datamodule):
        for _ in range(2):
            trainer.test(module, datamodule=datamodule, verbose=False)
        trainer.fit(module, datamodule=datamodule)
        assert equal_bits(base, weights(module))


def test_a_cached_warm_start_gives_other_weights_than_a_fresh_one(tmp_path: Path) -> None:
    overrides = ("policy.warm_start.epochs=2", "iterations=1", "iterations_per_epoch=1")
    runs = [fit(toy_config(tmp_path, None, *overrides, "evaluate=false")) for _ in range(2)]
    assert equal_bits(weights(runs[0]), weights(runs[1]))
    assert len(list((tmp_path / "data" / "warm_start").glob("*/warm_start.json"))) == 1


def test_a_batch_of_uniform_groups_moves_the_weights(toy_model: str, tmp_path: Path) -> None:
    cfg = toy_config(
        tmp_path,
        toy_model,
        "rewards.success=0.0",
        "rewards.inadmissible=0.0",
        "rewards.malformed=0.0",
        "iterations=2",
    )
    with built(cfg) as (trainer, module, datamodule):
        fresh = weights(module)
        trainer.fit(module, datamodule=datamodule)
        assert equal_bits(fresh, weights(module))
        assert trainer.global_step == 0
        assert module.iteration == 2
    assert curves(tmp_path)["rollout/skipped_update"] == {0: 1.0, 1: 1.0}
