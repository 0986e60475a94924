"""Data-parallel ranks train as one process does, whatever their number."""

from __future__ import annotations

from pathlib import Path

import pytest
import rank_runs
import torch
from runs import curves, process, toy_overrides

SPLIT = ("update_epochs=2", "num_minibatches=3", "micro_batch_tokens=64")
SHORT_OF_MEMORY = (
    "+callbacks.fail._target_=toy.MemoryRunsOut",
    "+callbacks.fail.rank=1",
    "+callbacks.fail.after=2",
)
DDP = ("trainer.strategy=ddp", "trainer.devices=2", "evaluate=false")


def weights_of_ranks(model: str, folder: Path, *overrides: str) -> list[dict[str, torch.Tensor]]:
    """The weights of both ranks after a run of the real command."""
    keep = ("+callbacks.ranks._target_=toy.KeepWeights", f"+callbacks.ranks.folder={folder}")
    done = process("train.py", *toy_overrides(folder, model), *DDP, *keep, *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def runs_of_ranks(toy_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of `rank_runs`, of all cases and numbers of ranks."""
    folder = tmp_path_factory.mktemp("rank_runs")
    done = process(rank_runs.__file__, toy_model, str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("case", rank_runs.CASES)
def test_the_number_of_ranks_changes_what_is_sampled_or_learnt(
    runs_of_ranks: Path, case: str
) -> None:
    """Sums of other orders differ in the last bit of a float32.

    A draw would have to lie that close to the edge between two tokens to come out another one. Of
    the some thousand draws here none does; were it otherwise, another seed would do.
    """
    folder = runs_of_ranks / case
    (one,) = (torch.load(path, weights_only=True) for path in (folder / "1").glob("*.pt"))
    assert len(one["sampled"]) > 25
    for size in rank_runs.SIZES[1:]:
        parts = [
            torch.load(folder / str(size) / f"{rank}.pt", weights_only=True) for rank in range(size)
        ]
        sampled = [item for part in parts for item in part["sampled"].items()]
        assert len(sampled) == len(one["sampled"])
        assert dict(sampled) == one["sampled"]
        for part in parts:
            torch.testing.assert_close(part["weights"], one["weights"], rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(part["weights"], parts[0]["weights"], rtol=0, atol=0)
        same, several = curves(folder / "1" / "run"), curves(folder / str(size) / "run")
        for name in ("train/success_rate", "policy/entropy", "policy/approx_kl", "aem/alpha_max"):
            assert several[name] == pytest.approx(same[name], rel=1e-3, abs=1e-6), name


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
