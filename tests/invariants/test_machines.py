"""Ranks on several machines, and ranks that share one policy's layers."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sharded_runs
import torch
from coin import ACTIONS
from fake_vllm import FakeVllm, serving
from runs import curves, process, toy_overrides

from aem_lightning.modules.policy import load_tokenizer

# On one of two ranks memory runs out in the middle of an update, and one has no validation.
UNEVEN = (
    *("update_epochs=2", "num_minibatches=3", "micro_batch_tokens=64"),
    "+callbacks.fail._target_=toy.MemoryRunsOut",
    *("+callbacks.fail.rank=1", "+callbacks.fail.after=2", "datamodule.validation_tasks=1"),
)
NODES = (
    *("trainer.strategy=ddp", "trainer.devices=1", "trainer.num_nodes=2"),
    *("evaluate=false", "rank_timeout_s=900"),
)


def two_machines(folder: Path, model: str, *overrides: str) -> list[dict[str, torch.Tensor]]:
    """The weights of two ranks, each started by a torchrun of its own, as on two machines."""
    keep = ("+callbacks.ranks._target_=toy.KeepWeights", f"+callbacks.ranks.folder={folder}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = ("--master-addr=127.0.0.1", f"--master-port={free.getsockname()[1]}")
    torchrun = ("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *place)
    words = (*toy_overrides(folder, model), *keep, *NODES, *overrides)
    commands = [(*torchrun, f"--node-rank={node}", "train.py", *words) for node in range(2)]
    with ThreadPoolExecutor() as both:
        ended = [*both.map(lambda command: process(*command, timeout=500), commands)]
    assert [done.returncode for done in ended] == [0, 0], "".join(d.stderr for d in ended)
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
def test_machines_have_a_folder_each_or_uneven_ranks_drift_apart(
    toy_model: str, tmp_path: Path
) -> None:
    first, second = two_machines(tmp_path, toy_model, *UNEVEN)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    (log,) = tmp_path.glob("logs/*/*/*.log")
    told = log.read_text(encoding="utf-8")
    assert "Out of memory: the budget" in told  # a warning of rank 1
    assert told.count("iteration 4/4: ") == 1  # rank 0 alone says how the run goes


@pytest.fixture(scope="module")
def answers() -> Iterator[FakeVllm]:
    """A server that answers with actions of the toy environment."""
    with serving() as fake:
        fake.max_model_len = 4096
        yield fake


@pytest.fixture(scope="module")
def shared(toy_model: str, answers: FakeVllm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of `sharded_runs`."""
    folder = tmp_path_factory.mktemp("sharded_runs")
    tokenizer = load_tokenizer(toy_model)
    answers.served = toy_model
    answers.replies = [
        [*tokenizer(action, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        for action in ACTIONS
    ]
    done = process(sharded_runs.__file__, toy_model, str(folder), answers.url, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_ranks_that_share_a_policy_play_or_learn_otherwise(shared: Path) -> None:
    one, *parts = (
        torch.load(path, weights_only=True)
        for path in (shared / "1" / "0.pt", *sorted((shared / "2").glob("*.pt")))
    )
    assert len(one["sampled"]) > 25
    assert {key: said for part in parts for key, said in part["sampled"].items()} == one["sampled"]
    for part in parts:
        torch.testing.assert_close(part["weights"], one["weights"], rtol=1e-3, atol=1e-5)
        assert part["held"] < one["held"]
    same, several = (curves(shared / size / "run") for size in "12")
    assert several["policy/grad_norm"] == pytest.approx(same["policy/grad_norm"], rel=1e-3)


def test_ranks_that_share_a_policy_save_what_is_frozen_or_send_adapters_twice(
    shared: Path, answers: FakeVllm
) -> None:
    alone, several = (
        torch.load(shared / size / "run/checkpoints/last.ckpt", weights_only=True) for size in "12"
    )
    assert alone["state_dict"].keys() == several["state_dict"].keys()
    torch.testing.assert_close(several["state_dict"], alone["state_dict"], rtol=1e-3, atol=1e-5)
    # Of two iterations, a validation each: each version once, whatever the number of ranks.
    loads = [
        body["lora_name"] for path, body in answers.seen if path.endswith("/load_lora_adapter")
    ]
    assert len(set(loads)) == len(loads) == len({body["model"] for body in answers.completions()})
