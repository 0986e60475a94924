"""Checkpoint files: whole or not there, and never loaded with a bit that was not written."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from aem_lightning.files import write_atomically
from aem_lightning.runner.checkpoint_io import SealedCheckpointIO, is_whole
from aem_lightning.runner.checkpoints import read_checkpoint


def contents(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "state_dict": {"a": torch.randn(40, 30, generator=generator)},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.randn(20, generator=generator)}}}],
        "aem_lightning": {"config": {"seed": seed}, "iteration": 3},
    }


@pytest.fixture
def last(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints" / "last.ckpt"
    SealedCheckpointIO().save_checkpoint(contents(), path)
    return path


def test_a_sealed_checkpoint_is_none_of_torchs_own(last: Path) -> None:
    for stored in (read_checkpoint(last), torch.load(last, weights_only=True, mmap=True)):
        torch.testing.assert_close(stored, contents(), rtol=0, atol=0)
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]


def test_a_flipped_bit_is_loaded(last: Path, tmp_path: Path) -> None:
    """Anywhere: in tensors, in names, in padding, in headers, in the seal; by every reader."""
    data, rng = last.read_bytes(), random.Random(0)
    SealedCheckpointIO().save_checkpoint(contents(1), last.with_name("best.ckpt"))
    seal = range(len(data) - 100, len(data))
    for place in [*(rng.randrange(len(data)) for _ in range(150)), *seal]:
        flipped = bytearray(data)
        flipped[place] ^= 1 << rng.randrange(8)
        last.write_bytes(flipped)
        for read in (read_checkpoint, SealedCheckpointIO().load_checkpoint):
            with pytest.raises(ValueError, match=r"last\.ckpt: this .*best\.ckpt"):
                read(last)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99, 0.9999])
def test_half_a_checkpoint_is_loaded(last: Path, share: float) -> None:
    data = last.read_bytes()
    last.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r"only a part of one|damaged"):
        read_checkpoint(last)


def test_a_checkpoint_of_an_earlier_version_is_refused_or_taken_damaged(last: Path) -> None:
    torch.save(contents(), last)
    torch.testing.assert_close(read_checkpoint(last), contents(), rtol=0, atol=0)
    data, tensor = bytearray(last.read_bytes()), contents()["state_dict"]["a"].numpy().tobytes()
    data[data.index(tensor) + 17] ^= 4
    last.write_bytes(data)
    with pytest.raises(ValueError, match=r"is damaged.*Type that of another run"):
        read_checkpoint(last)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_costs_the_checkpoint_before(
    last: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        SealedCheckpointIO().save_checkpoint(contents(1), last)
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]
    torch.testing.assert_close(read_checkpoint(last), contents(), rtol=0, atol=0)


def test_what_a_kill_left_gets_in_the_way(last: Path) -> None:
    last.with_name(".last.ckpt.partial").write_bytes(b"half")
    SealedCheckpointIO().save_checkpoint(contents(1), last)
    assert is_whole(last)
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]


def test_files_pass_through_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename is atomic within one file system only."""
    renamed, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (renamed.append((a, b)), replace(a, b)))
    write_atomically(tmp_path / "deep" / "summary.json", "{}")
    assert [(a.parent, b.parent) for a, b in renamed] == [(tmp_path / "deep",) * 2]
    assert (tmp_path / "deep" / "summary.json").read_text() == "{}"
