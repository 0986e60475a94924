"""The update's benchmark: it runs whole, its fits are right, its workloads are what they say."""

import argparse
import json

import pytest
import torch


@pytest.fixture(scope="module")
def bench(import_benchmark):
    return import_benchmark("bench_update")


def test_the_benchmark_does_not_run(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "has_trl", lambda: False)  # each of its cases starts a process
    target = tmp_path / "new" / "update.json"
    small = ["--tokens", "16", "32", "--vocabularies", "50", "100", "--hidden", "8"]
    bench.main([*small, "--turns", "2", "4", "--json", str(target)])
    report = json.loads(target.read_text(encoding="utf-8"))
    assert report["machine"]["torch"] == torch.__version__
    heads = [entry for entry in report["head"] if entry["head"] == "ours"]
    assert len(heads) == 4
    assert all(entry["seconds"] > 0 and entry["gradient_error"] < 1e-5 for entry in heads)
    assert {"vocabulary_time", "response_tokens_at_vocabulary_50_time"} <= set(report["growth"])
    assert report["ratios"]["head_100_32_share_of_floor"] > 0
    assert {"head_100_32_over_naive_time", "packed_over_padded_time"} <= set(report["ratios"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("Log-prob", "Ragged", "history", "Growth"))


def test_kinds_of_rows_hold_other_responses(bench):
    played = {kind: bench.episode(5, 1, kind) for kind in ("transcript", "history", "window")}
    assert {kind: len(t.rows) for kind, t in played.items()} == {
        "transcript": 1,
        "history": 5,
        "window": 5,
    }
    said = {
        kind: [t.rows[turn.row][turn.start : turn.start + turn.length] for turn in t.turns]
        for kind, t in played.items()
    }
    assert said["transcript"] == said["history"] == said["window"]
    # A row with the full history is the transcript up to its response.
    assert played["history"].rows[-1] == played["transcript"].rows[0]
    assert len(played["window"].rows[-1]) < len(played["history"].rows[-1])


OPTIONS = argparse.Namespace(device="cpu", dtype="float32", hidden=8, chunk=8, threads=1)


@pytest.mark.slow
def test_the_head_of_trl_is_another_one(bench):
    if not bench.has_trl():
        pytest.skip("trl is not installed")
    _, theirs = bench.head_case(("naive", "trl"), 16, 50, OPTIONS)
    assert theirs["seconds"] > 0
    assert theirs["gradient_error"] < 1e-5


def test_a_case_that_memory_does_not_hold_is_computed(bench, monkeypatch):
    monkeypatch.setattr(bench, "free_memory", lambda device: 1000.0)
    naive, ours = bench.head_case(("naive", "ours"), 16, 50, OPTIONS)
    assert naive["seconds"] is None
    assert naive["skipped"] == "memory"
    assert ours["seconds"] > 0
