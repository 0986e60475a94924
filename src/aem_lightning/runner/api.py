"""The evaluation of a prompted model (``policy=api``): every evaluation task, over HTTP.

A finished episode goes at once into a file of transcripts, under a key of everything that its play
depends on: the next run plays only what is missing there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from aem_lightning.datamodules import AgentDataModule
from aem_lightning.rollout import (
    ChatResponder,
    Endpoint,
    EndpointError,
    Episode,
    TextEncoder,
    stable_seed,
)
from aem_lightning.runner.api_play import Player, play
from aem_lightning.runner.build import (
    build_datamodule,
    build_prompt,
    instantiate,
    plain,
    warm_start_data,
)
from aem_lightning.runner.episode_store import EpisodeStore
from aem_lightning.runner.parts import check_classes, made
from aem_lightning.runner.report import game_hashes, results_of, write_report
from aem_lightning.runner.summary import print_counts
from aem_lightning.types import Task, Trajectory

log = logging.getLogger(__name__)

# Raise it when an episode is played in another way: older ones are then not taken for new ones.
FORMAT = 2
_LIMITS = ("memory", "history_length", "max_turns", "max_new_tokens", "temperature")


def evaluate_api(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate ``cfg.model``; returns what ``evaluation.json`` holds.

    Raises:
        EndpointError: The endpoint does not answer, or no episode came to an end.
    """
    with contextlib.ExitStack() as stack:
        endpoint = checked_endpoint(cfg)
        stack.callback(endpoint.close)
        endpoint.check()
        if cfg.splits is not None:
            cfg = cfg.copy()
            OmegaConf.update(cfg, "datamodule.evaluation_splits", cfg.splits, force_add=True)
        datamodule = build_datamodule(cfg)
        stack.callback(datamodule.close)
        return _evaluate(cfg, endpoint, datamodule)


def checked_endpoint(cfg: DictConfig) -> Endpoint:
    """The endpoint of ``cfg``, not asked yet, once all other parts are known to be good.

    Raises:
        ConfigError: A class or an argument that does not fit.
        ValueError: An option of the endpoint that cannot be.
    """
    parts = ("datamodule", "prompt", "rewards")
    check_classes(cfg, parts)
    for group in parts:
        made(group, cfg[group])
    options = ("api_key_env", "timeout_s", "max_retries", "token_budget", "request")
    return Endpoint(cfg.model, cfg.base_url, **{name: plain(cfg)[name] for name in options})


def _evaluate(cfg: DictConfig, endpoint: Endpoint, datamodule: AgentDataModule) -> dict[str, Any]:
    tasks = [task for split in datamodule.evaluation_splits for task in datamodule.tasks(split)]
    store = EpisodeStore(
        Path(cfg.transcripts).expanduser().absolute(),
        episode_keys(cfg, game_hashes(datamodule), tasks),
        {"stage": "evaluate", "iteration": None, "model": endpoint.model},
    )
    if store.episodes:
        known = len(store.episodes)
        log.info("%d of %d episodes are in %s", known, known + len(store.missing), store.path)
    responder = partial(
        ChatResponder,
        endpoint,
        TextEncoder(build_prompt(cfg, datamodule)),
        **{name: cfg[name] for name in _LIMITS if name != "max_turns"},
    )
    player = Player(responder, instantiate(cfg.rewards), cfg.max_turns)
    # Not in the tasks' own order: a run that a budget ends has then played tasks of every type.
    missing = sorted(
        store.missing, key=lambda due: (due[1], stable_seed(cfg.seed, "api", due[0].id))
    )
    episodes = [Episode(task, group, copy) for group, (task, copy) in enumerate(missing)]
    lost = play(endpoint, player, episodes, datamodule, store, cfg.concurrency)
    broken = [done.trajectory for done in lost]
    handled = sum((Counter(done.handled) for done in lost), store.handled)
    if not store.episodes:
        raise EndpointError(_nothing_finished(endpoint, broken))
    report = {
        "model": endpoint.model,
        "base_url": endpoint.base_url,
        "prompt": plain(cfg.prompt),
        **{name: cfg[name] for name in (*_LIMITS, "seed", "repeats")},
        "games": game_hashes(datamodule),
        "complete": not store.missing,
        "missing": len(store.missing),
        "handled": dict(sorted(handled.items())),
        "tokens": {**store.tokens, "this_run": endpoint.spent},
        "transcripts": str(store.path),
        **results_of([*store.episodes, *broken], datamodule.evaluation_splits, cfg.repeats),
    }
    write_report(Path(cfg.paths.output_dir), report, f"evaluation of {endpoint.model}")
    print_counts("handled: replies and requests out of the ordinary", report["handled"])
    if store.missing:
        log.warning("%s", _what_is_missing(endpoint, store, broken))
    return report


def episode_keys(
    cfg: DictConfig, games: Mapping[str, str], tasks: Sequence[Task]
) -> dict[str, tuple[Task, int]]:
    """Each task and repeat by a hash of what its play depends on, without the endpoint's address.

    Args:
        cfg: The run's config.
        games: A hash of the games of each split, where there is one.
        tasks: The tasks.
    """
    shared = {
        "format": FORMAT,
        "model": cfg.model,
        "request": plain(cfg)["request"],
        "prompt": plain(cfg.prompt),
        **{name: cfg[name] for name in (*_LIMITS, "seed")},
        "datamodule": warm_start_data(cfg),
    }

    def key(task: Task, copy: int) -> str:
        parts = {**shared, "games": games.get(task.split), "task": [task.split, task.id]}
        if copy:
            parts["copy"] = copy
        text = json.dumps(parts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    return {key(task, copy): (task, copy) for copy in range(cfg.repeats) for task in tasks}


def _what_is_missing(endpoint: Endpoint, store: EpisodeStore, broken: Sequence[Trajectory]) -> str:
    stopped = len(store.missing) - len(broken)
    lines = [f"{len(store.missing)} episodes are missing: the same command plays them."]
    if stopped:
        lines.append(
            f"token_budget={endpoint.token_budget} ended {stopped} of them. Short episodes are won "
            "more often, so the rate is too high until all are played."
        )
    if broken:
        lines.append(f"{len(broken)} broke, the last: {broken[-1].infra_error}")
    return "\n  ".join(lines)


def _nothing_finished(endpoint: Endpoint, broken: Sequence[Trajectory]) -> str:
    if broken:
        return f"All {len(broken)} episodes broke, the last: {broken[-1].infra_error}"
    return (
        f"token_budget={endpoint.token_budget} was spent before one episode came to its end: type "
        f"a larger token_budget=..., or concurrency=1 (used: {endpoint.spent} tokens)"
    )
