"""Runs that are killed at any moment end as one that was not."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import lightning as L
import pytest
from kills import killed_runs
from runs import equal_bits, fit, toy_config, weights

from aem_lightning.modules import AgentModule
from aem_lightning.modules.journal import fingerprint
from aem_lightning.rollout import Request, SlotEngine
from aem_lightning.types import Task

MEMORIES = ("memory=transcript", "memory=window")


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_ends_with_other_bits(
    toy_model: str, tmp_path: Path
) -> None:
    runs = list(killed_runs(tmp_path, toy_model, kills=3))
    assert sum(kills for kills, _ in runs) == 3
    assert all(same for _, same in runs)


class Interrupt(L.Callback):
    """Ends a run in the middle of an update."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: AgentModule, *_: object
    ) -> None:
        if pl_module.iteration == self.iteration:
            raise KeyError("interrupted")


def test_a_run_in_another_folder_plays_again_what_was_played(
    toy_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ("iterations=4", "iterations_per_epoch=4")
    whole = weights(fit(toy_config(tmp_path / "whole", toy_model, *run)))
    with pytest.raises(KeyError, match="interrupted"):
        fit(toy_config(tmp_path / "a", toy_model, *run), callbacks=[Interrupt(2)])
    names = sorted(path.name for path in (tmp_path / "a" / "journal").iterdir())
    assert names == ["0-0.jsonl", "1-0.jsonl", "2-0.jsonl"]

    submitted: list[int] = []
    submit = SlotEngine.submit

    def counting(engine: SlotEngine, requests: Iterable[Request]) -> None:
        requests = list(requests)
        submitted.extend(engine.version for _ in requests)
        submit(engine, requests)

    monkeypatch.setattr(SlotEngine, "submit", counting)
    last = tmp_path / "a" / "checkpoints" / "last.ckpt"  # the beginning: no epoch was complete
    resumed = fit(
        toy_config(tmp_path / "b", toy_model, *run),
        ckpt_path=last,
    )
    assert equal_bits(weights(resumed), whole)
    assert set(submitted) == {3, 4}  # the last iteration, and the validation after it
    assert not (tmp_path / "a" / "journal").exists()
    assert not (tmp_path / "b" / "journal").exists()


def test_a_journal_fits_other_weights_or_tasks(toy_model: str, tmp_path: Path) -> None:
    agent = fit(toy_config(tmp_path, toy_model, "iterations=1", "iterations_per_epoch=1"))
    tasks = [Task("train/0"), Task("train/1")]
    known = fingerprint(agent, tasks, agent.policy)
    assert fingerprint(agent, tasks, agent.policy) == known
    agent.config |= {"name": "another", "optimizer": {"lr": 1.0}}  # no rollout depends on these
    assert fingerprint(agent, tasks, agent.policy) == known
    assert fingerprint(agent, tasks[::-1], agent.policy) != known
    agent.config |= {"memory": "window"}
    assert fingerprint(agent, tasks, agent.policy) != known
    agent.config["memory"] = "transcript"
    assert fingerprint(agent, tasks, agent.policy) == known
    weight = next(iter(agent.policy.trainable().values()))
    weight.data.view(-1)[0] = weight.data.view(-1)[0].nextafter(weight.new_tensor(9.0))
    assert fingerprint(agent, tasks, agent.policy) != known


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("memory", MEMORIES)
def test_a_hundred_kills(toy_model: str, tmp_path: Path, memory: str) -> None:
    runs = list(killed_runs(tmp_path, toy_model, 100, memory, "max_turns=8", seed=1))
    assert sum(kills for kills, _ in runs) == 100
    assert all(same for _, same in runs)
