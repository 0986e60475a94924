"""The short form of ``make faults``: one try of a kind of each sort that takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults.__main__ import table, tried
from faults.kinds import kinds

KINDS = {kind.name: kind for kind in kinds()}
SHORT = ("bit flipped anywhere", "killed at fsync 20")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


def test_there_are_few_kinds_or_two_of_one_name() -> None:
    assert len(KINDS) == len(list(kinds())) >= 60


@pytest.mark.parametrize("name", SHORT)
def test_a_fault_ends_otherwise_than_it_must(name: str, folder: Path) -> None:
    row = tried(KINDS[name], 0, folder)
    assert row["as_it_must"], row
    assert f"| {name} | 1 | 1 × {row['seen']} | nothing |" in table([row], None)
