"""The first hour on a GPU, as far as a CPU can try it: the command, and its cheap pieces."""

import json
import subprocess
from types import SimpleNamespace

import pytest

from aem_lightning.gpu_check import __main__ as command
from aem_lightning.gpu_check import pieces
from aem_lightning.gpu_check.decoding import expected
from aem_lightning.gpu_check.piece import Check, Piece
from aem_lightning.gpu_check.report import engines, table, verdict


def lines(said):
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


def test_cheap_pieces_are_not_green_or_are_measured_again(tmp_path, capsys, monkeypatch):
    words = ["device=cpu", f"folder={tmp_path}", "only=graphs,memory"]
    assert command.main(words) == 0
    said = capsys.readouterr().out
    graphs, memory = lines(said)
    assert said.rstrip().endswith("GREEN: all 2 pieces.")
    assert graphs["same_ids"]
    assert graphs["max_logprob_difference"] < 1e-3
    assert set(graphs["steps"]) == {f"{b} rows, {r} read" for b in (2, 4) for r in (64, 128)}
    assert set(graphs["engines"]) == set(graphs["steps"])
    assert not graphs["ragged"]["by_a_kernel"]  # nor is there one on a CPU
    assert min(graphs["ragged"]["used_ms"], graphs["ragged"]["masked_ms"]) > 0
    assert "2 rows, 64 read: engine=hf" in said
    assert memory["micro_batch_tokens"] == 50_000
    assert "concurrency=32 or max_context=16" in memory["told"]
    assert "| graphs | steps, 4 rows, 128 read, graph_ms |" in (tmp_path / "table.md").read_text()
    monkeypatch.setattr(command, "measure", lambda *_: pytest.fail("a green piece ran again"))
    assert command.main(words) == 0
    assert lines(capsys.readouterr().out) == [graphs, memory]


@pytest.fixture
def made(monkeypatch):
    """Three pieces, of which the second is red once; the names of those that ran."""
    ran = []

    def measure(name):
        def run(check):
            ran.append(name)
            if name == "b" and ran.count("b") == 1:
                raise RuntimeError("of no\nuse")
            return {"red": None, "ms": [1.25, 2], "of": {"x": None}}

        return run

    made = [Piece(name, f"about {name}", measure(name)) for name in "abc"]
    monkeypatch.setattr(pieces, "PIECES", made)
    return ran


def test_pieces_after_a_red_one_run_unless_asked_for(made, tmp_path, capsys):
    words = ["device=cpu", f"folder={tmp_path}"]
    assert command.main(words) == 1
    assert "RED. b: RuntimeError: of no use. Not run: c." in capsys.readouterr().out
    assert command.main(words) == 0
    assert made == ["a", "b", "b", "c"], "what was green ran again, or what was red did not"
    assert "| c | of, x | – |" in capsys.readouterr().out


def test_a_red_piece_ends_the_check_though_it_is_to_go_on(made, tmp_path):
    assert command.main(["device=cpu", f"folder={tmp_path}", "keep_going=true"]) == 1
    assert made == ["a", "b", "c"]


def test_a_piece_on_a_gpu_hangs_or_shares_a_process(made, tmp_path, monkeypatch):
    calls = []

    def run(words, env, timeout, **_):
        calls.append((words[3:], env["OF_IT"], timeout))
        if len(calls) == 1:
            raise subprocess.TimeoutExpired(words, timeout)
        return SimpleNamespace(returncode=-9)

    monkeypatch.setattr(subprocess, "run", run)
    check = Check("cuda", tmp_path, tmp_path)
    piece = Piece("a", "about a", lambda check: {}, {"OF_IT": "1"})
    assert "more than 600 s" in command.run(check, piece, 600.0)["red"]
    assert "left no figures" in command.run(check, piece, 600.0)["red"]
    assert calls[0] == (["alone=a", "device=cuda", f"folder={tmp_path}"], "1", 600.0)
    assert check.earlier("a") is None
    assert not made


@pytest.mark.parametrize(
    ("word", "said"),
    [("devices=cpu", "no such option"), ("device=tpu", "allowed are"), ("only=x", "no such piece")],
)
def test_a_word_that_is_wrong_is_taken(word, said, tmp_path):
    with pytest.raises(SystemExit, match=said):
        command.main(["device=cpu", f"folder={tmp_path}", word])


def test_a_verdict_forgets_what_was_not_run():
    green = {"red": None, "figure": 0.123456}
    assert verdict({"a": green}, ["a", "b"]) == "Green so far; not run: b."
    assert "| a | figure | 0.1235 |" in table({"a": green})


@pytest.mark.parametrize(
    ("seconds", "share", "advice"),
    [(0.02, "50%", "try engine=vllm"), (0.0125, "80%", "gains little")],
)
def test_the_choice_of_an_engine_hangs_on_something_else(seconds, share, advice):
    """64 rows a step of 20 ms, where the memory's rate allows 10 ms."""
    found = expected(64, seconds, 0.01)
    assert found["hf_tokens_per_s"] == pytest.approx(64 / seconds)
    assert found["vllm_at_most_tokens_per_s"] == pytest.approx(6400)
    said = engines({"graphs": {"engines": {"64 rows, 1280 read": found}}})
    assert "engine=vllm at most 6,400" in said
    assert f"{share} of what memory allows" in said
    assert advice in said
    assert engines({"graphs": {"red": None}}) == engines({}) == ""
