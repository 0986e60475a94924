"""What a person sees while a run goes on: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import io
import logging
import pty
import re
import select
import sys
from pathlib import Path

import pytest
import yaml
from runs import built, fit, toy_config

from aem_lightning.beats import LISTENERS
from aem_lightning.callbacks import Meter, progress
from aem_lightning.callbacks.progress import duration
from aem_lightning.types import Task, Trajectory


def episode(*, won: bool = False, broke: bool = False) -> Trajectory:
    made = Trajectory(Task("a", "b", "train"), 0, 0, won=won)
    made.infra_error = "broke" if broke else None
    return made


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_of_the_log_tears_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "30")
    handler = logging.StreamHandler(terminal)
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [handler])
    with Meter("evaluation", 240) as meter:
        meter.add(36)
        root.warning("a word between")
        meter.add(1, note="loss 0.5")
        monkeypatch.setattr(progress, "SECONDS_BETWEEN_LOOKS", 0.0)
        meter.sampled(1)
    assert root.handlers == [handler]
    lines = re.split(r"[\r\n]+", terminal.getvalue())
    assert "a word between" in lines  # alone on its line
    assert lines.count("a word between") == 1
    assert any(line.startswith("evaluation: 36 of 240 episodes |") for line in lines)
    assert any(line.strip().endswith("tokens/s, loss 0.5") for line in lines)
    assert not lines[-1].strip(), "the bar is left behind"


def test_a_terminal_that_does_not_know_its_size_stays_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, theirs = pty.openpty()  # 0 columns, as a container's often has
    with open(ours, "rb", buffering=0) as screen, open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        with Meter("evaluation", 2):
            assert select.select([screen], [], [], 5)[0], "nothing in five seconds"
            assert b"evaluation: 0 of 2 episodes |" in screen.read(4096)


def test_a_pipe_gets_control_characters_or_nothing(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    with Meter("too soon for a line", 2) as meter:
        meter.add()
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with Meter("imitation", 2, "batches") as meter:
        meter.add(note="loss 0.5")
        meter.add(2)  # more than was foreseen
        meter.played([episode(won=True), episode(won=False), episode(broke=True)])
        meter.sampled(10**9)
    assert [re.sub(r"\d+ tokens", "N tokens", message) for message in caplog.messages] == [
        "imitation: 1 of 2 batches, 0 s left, loss 0.5",
        "imitation: 3 of 3 batches, 0 s left",
        "imitation: 6 of 6 batches, 0 s left, success 50.0 %",
        "imitation: 6 of 6 batches, 0 s left, success 50.0 %, N tokens/s",
    ]
    assert capsys.readouterr() == ("", "")


def test_a_run_says_nothing_for_half_an_hour(
    toy_model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    counted: dict[str, list[int]] = {}

    class Counting(Meter):
        def __init__(self, what: str, total: int, *more: str, **others: str) -> None:
            super().__init__(what, total, *more, **others)
            self.seen = counted.setdefault(what, [0, total, 0])

        def add(self, count: int = 1, note: str = "") -> None:
            self.seen[0] += count

        def sampled(self, tokens: int) -> None:
            self.seen[2] += tokens

    monkeypatch.setattr(progress, "Meter", Counting)
    caplog.set_level(logging.INFO, logger=progress.__name__)
    small = (
        "iterations_per_epoch=1",
        "datamodule.evaluation_batch=2",
        "datamodule.validation_tasks=3",
    )
    with built(toy_config(tmp_path, toy_model, *small, "iterations=2")) as (trainer, module, data):
        trainer.test(module, datamodule=data, verbose=False)
        trainer.fit(module, datamodule=data)
    assert not LISTENERS
    tokens = {what: seen[2] for what, seen in counted.items()}
    played = {"evaluation", "validation", *(f"iteration {n}/2, rollout" for n in (1, 2))}
    assert {what for what, count in tokens.items() if count} == played
    parts = {what: seen[:2] for what, seen in counted.items()}
    assert {what: seen for what, seen in parts.items() if ", " not in what} == {
        "evaluation": [8, 8],
        "validation": [6, 3],  # twice
    }
    for number in (1, 2):
        assert parts[f"iteration {number}/2, rollout"] == [16, 16]
        for stage in ("scoring", "scoring by the reference", "update"):
            done, total = parts[f"iteration {number}/2, {stage}"]
            assert done == total > 0
    seconds = r"\d+ s"
    outcome = (
        rf"success \d+\.\d %, entropy \d\.\d{{3}}, KL -?\d\.\d{{4}}, {seconds}, {seconds} left"
    )
    expected = [
        f"iteration 1/2: {outcome}",
        rf"validation after iteration 1: success \d+\.\d % of 3, {seconds}, {seconds} left",
        f"iteration 2/2: {outcome}",
        rf"validation after iteration 2: success \d+\.\d % of 3, {seconds}, 0 s left",
    ]
    assert len(lines_of(caplog)) == len(expected)
    for message, pattern in zip(lines_of(caplog), expected, strict=True):
        assert re.fullmatch(pattern, message), message

    caplog.clear()
    last = tmp_path / "checkpoints" / "last.ckpt"
    hparams = tmp_path / "tensorboard" / "hparams.yaml"
    before = yaml.safe_load(hparams.read_text())
    assert before["optimizer"]["lr"] == 1e-3, "an evaluation came first, and left it empty"
    fit(toy_config(tmp_path, toy_model, *small, "iterations=3"), ckpt_path=last)
    assert [message.partition(":")[0] for message in lines_of(caplog)] == [
        "iteration 3/3",
        "validation after iteration 3",
    ]
    assert yaml.safe_load(hparams.read_text()) == before


def test_the_time_left_forgets_validations(monkeypatch: pytest.MonkeyPatch) -> None:
    class Run:
        max_epochs, current_epoch = 10, 4

    said = progress.Progress()
    said._iterations, said._validations = [30.0, 50.0], [100.0]
    assert said._left(Run(), iterations=14) == 14 * 40 + 6 * 100


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == progress.__name__]


@pytest.mark.parametrize(
    ("seconds", "said"), [(31.4, "31 s"), (600, "10 min"), (4320, "1.2 h"), (0, "0 s")]
)
def test_a_duration_is_hard_to_read(seconds: float, said: str) -> None:
    assert duration(seconds) == said
