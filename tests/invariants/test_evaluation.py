"""Evaluation: reproducible, and every task once."""

from __future__ import annotations

from pathlib import Path

from runs import built, toy_config

from aem_lightning.runner.evaluation import play_all


def test_evaluation_depends_on_more_than_seed_and_task(toy_model: str, tmp_path: Path) -> None:
    episodes = []
    changes = ("seed=0", "seed=0", "concurrency=3", "datamodule.evaluation_batch=3")
    for number, change in enumerate(changes):
        with built(toy_config(tmp_path / str(number), toy_model, change)) as (
            trainer,
            module,
            dm,
        ):
            first, again = (play_all(trainer, module, dm)["episodes"] for _ in range(2))
            assert first == again
            episodes.append(first)
    assert all(other == episodes[0] for other in episodes[1:])
    tasks = [(episode["split"], episode["task"]) for episode in episodes[0]]
    assert tasks == [(s, f"{s}/{i}") for s in ("valid_seen", "valid_unseen") for i in range(4)]


def test_another_evaluation_seed_plays_the_same_episodes(toy_model: str, tmp_path: Path) -> None:
    turns = []
    for seed in range(2):
        with built(toy_config(tmp_path / str(seed), toy_model, f"seed={seed}")) as (
            trainer,
            module,
            dm,
        ):
            play_all(trainer, module, dm)
            turns.append([turn.response for played in module.tested for turn in played.turns])
    assert turns[0] != turns[1]
