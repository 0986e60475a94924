"""Experiments of the time before `algorithm=`: each old name composes as the command beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from runs import ROOT, composed

BEFORE = Path(__file__).parents[1] / "data" / "experiments_before_algorithms.json"
NAMES = ROOT / "docs" / "names.md"
# What there was no word for.
NEW = (
    *("algorithm", "arm", "aem_scope", "fast", "preflight", "strict", "rollout_journal"),
    *("rank_timeout_s", "trainer.num_nodes", "rollout.lag"),
    *("profile_decode_steps", "profile_micro_batches"),
    *("engine.cache", "reply_tokens", "optimized_metric", "policy.warm_start.demonstrations_from"),
    *("filter", "filter_share", "anchor_by", "modulation.proxy", "modulation.then.proxy"),
    *("policy.chat_template_kwargs", "policy.thoughts", "policy.warm_start.imitate_losses"),
    *("datamodule.memory_gb", "datamodule.pass_environment", "datamodule.on_bad_answer"),
    *("datamodule.environment.records", "datamodule.environment.model_name"),
    *("datamodule.environment.limits.disk_bytes", "datamodule.environment.images_gb"),
    *("datamodule.goals", "datamodule.validate"),  # of ALFWorld, where WebShop had it; of SWE
    *("datamodule.generate.most_edits", "datamodule.generate.invented"),
    *(
        f"callbacks.{name}."
        for name in ("progress", "hyperparameters", "learning", "trends", "overview")
    ),
    *(
        "callbacks.transcripts.every",
        "datamodule.environment.hosts",
        "datamodule.environment.shell",
    ),
)
# Its games are others now: easy bugs of invented functions, `undo` and `test`, who tries them.
CHANGED = {
    "swe_quickstart": (
        *("datamodule.root", "datamodule.generate.count", "max_turns", "max_new_tokens"),
        *("datamodule.validation_tasks", "algorithm", "advantage.", "optimizer.lr"),
        *(
            f"policy.warm_start.{name}"
            for name in ("demonstrations", "epochs", "max_turns", "slip")
        ),
    )
}
# Loggers got names of their own.
MOVED = {"logger.tensorboard.": "logger."}
# A callback that saves decides whether there are checkpoints; the bar is ours; half of the
# precision, on a GPU, is what null comes to.
TRAINER = ("trainer.enable_checkpointing", "trainer.enable_progress_bar", "trainer.precision")


def table() -> dict[str, list[str]]:
    """The rows of docs/names.md: `experiment=<old name>` and the overrides that take its place."""
    rows = [line.split("|")[1:3] for line in NAMES.read_text(encoding="utf-8").splitlines()]
    cells = [[cell.strip().strip("`") for cell in row] for row in rows]
    return {
        old.removeprefix("experiment="): new.split()
        for old, new in (row for row in cells if len(row) == 2)
        if old.startswith("experiment=")
    }


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys and their values; an empty dictionary is a value."""
    if not isinstance(node, dict) or not node:
        return {prefix[:-1]: node}
    found: dict[str, Any] = {}
    for name, value in node.items():
        found |= flat(value, f"{prefix}{name}.")
    return found


def before(name: str) -> dict[str, Any]:
    """What the old experiment composed to, by dotted key."""
    stored = json.loads(BEFORE.read_text(encoding="utf-8"))[name]
    if "settings" in stored:
        return dict(stored["settings"])
    settings = before(stored["like"]) | stored["but"]
    return {key: value for key, value in settings.items() if value != "__absent__"}


def without(settings: dict[str, Any], prefixes: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if not key.startswith(prefixes)}


def test_an_old_experiment_has_no_row_in_the_table() -> None:
    assert set(table()) == set(json.loads(BEFORE.read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", sorted(table()))
def test_an_old_experiment_composes_to_something_else(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("ALFWORLD_DATA", "WEBSHOP_DATA", "AEM_LIGHTNING_ROOT"):
        monkeypatch.delenv(variable, raising=False)
    cfg = composed([*table()[name], "paths.output_dir=."])
    now = flat(OmegaConf.to_container(cfg, resolve=True))
    for place, earlier in MOVED.items():
        now = {key.replace(place, earlier): value for key, value in now.items()}
    known = before(name)
    new = tuple(key for key in now if key.startswith(NEW) and key not in known)
    changed = TRAINER + CHANGED.get(name, ())
    assert without(now, new + changed) == without(known, changed)
