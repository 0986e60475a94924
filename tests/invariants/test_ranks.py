"""Two data-parallel ranks train as one process does on the same tasks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import curves, fit, process, toy_config, toy_overrides, weights

# SGD: what Adam makes of a gradient of nearly 0 depends on its last bits.
STEP = ("optimizer._target_=torch.optim.SGD", "optimizer.lr=0.1", "iterations=2")
WHOLE = ("update_epochs=1", "num_minibatches=1", "micro_batch_tokens=64")
SPLIT = ("update_epochs=2", "num_minibatches=3", "micro_batch_tokens=64")
SHORT_OF_MEMORY = (
    "+callbacks.fail._target_=toy.MemoryRunsOut",
    "+callbacks.fail.rank=1",
    "+callbacks.fail.after=2",
)


DDP = ("trainer.strategy=ddp", "trainer.devices=2", "evaluate=false")


def weights_of_ranks(model: str, folder: Path, *overrides: str) -> list[dict[str, torch.Tensor]]:
    """The weights of both ranks after a run of the real command."""
    keep = ("+callbacks.ranks._target_=toy.SameSampling", f"+callbacks.ranks.folder={folder}")
    done = process("train.py", *toy_overrides(folder, model), *DDP, *keep, *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_ranks_train_otherwise_than_one_process(toy_model: str, tmp_path: Path) -> None:
    first, second = weights_of_ranks(toy_model, tmp_path / "two", *STEP, *WHOLE)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    alone = weights(fit(toy_config(tmp_path / "one", toy_model, *STEP, *WHOLE)))
    torch.testing.assert_close(first, alone, rtol=1e-3, atol=1e-5)
    (run,) = (tmp_path / "two").glob("logs/*/*")
    two, one = curves(run), curves(tmp_path / "one")
    for name in ("train/success_rate", "policy/entropy", "policy/ref_kl", "aem/alpha_max"):
        assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name


def test_uneven_ranks_hang_or_drift_apart(toy_model: str, tmp_path: Path) -> None:
    """On one of them memory runs out in the middle of an update, too, and one has no validation."""
    uneven = (*SPLIT, *SHORT_OF_MEMORY, "datamodule.validation_tasks=1")
    first, second = weights_of_ranks(toy_model, tmp_path, *uneven)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    (log,) = tmp_path.glob("logs/*/*/*.log")
    assert "Out of memory: the budget" in log.read_text(encoding="utf-8")


def test_others_wait_for_a_rank_that_is_killed(toy_model: str, tmp_path: Path) -> None:
    kill = [f"+callbacks.kill.{word}" for word in ("_target_=toy.Kill", "epoch=1", "batch=0")]
    ended = process(
        "train.py", *toy_overrides(tmp_path, toy_model), *DDP, *kill, "+callbacks.kill.rank=1"
    )
    assert ended.returncode == 1, ended.stdout + ended.stderr
    *_, line = ended.stdout.strip().splitlines()
    (last,) = tmp_path.glob("logs/*/*/checkpoints/last.ckpt")
    assert "Rank 1 was killed by SIGKILL" in line
    assert line.endswith(f"ckpt_path={last} goes on.")
