import subprocess
import sys
from pathlib import Path

import pytest
import rank_columns
import torch
from runs import COMMAND_ENVIRONMENT


def test_statistics_over_two_ranks_differ_from_those_of_the_whole_batch(tmp_path):
    script = str(Path(rank_columns.__file__))
    ranks = [
        subprocess.Popen([sys.executable, script, str(r), str(tmp_path)], env=COMMAND_ENVIRONMENT)
        for r in range(2)
    ]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    whole = rank_columns.everything(rank_columns.make_batch(slice(None)))
    alone = rank_columns.everything(rank_columns.make_batch(slice(2, None)))
    for split in rank_columns.SPLITS:
        halves = [
            torch.load(tmp_path / f"{split}_{rank}.pt", weights_only=True) for rank in range(2)
        ]
        for name, expected in whole.items():
            found = torch.cat([half[name] for half, _ in halves])
            torch.testing.assert_close(found, expected)
            if split:
                assert not torch.allclose(alone[name], halves[1][0][name], rtol=1e-3), name
        for _, metrics in halves:
            assert metrics == pytest.approx(
                rank_columns.metrics(slice(None)) | {"rollout/tampered": 1 / 6}
            )
