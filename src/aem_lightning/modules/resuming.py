"""How a run goes on from a checkpoint: one counter decides, and what was typed holds.

Lightning would bring back its own counts of epochs and batches, the options of the optimizer and
the schedule as they were when the checkpoint was written. Here the number of finished iterations
says where the run is, and everything else comes from this run's settings: of the earlier run stay
the weights, the optimizer's moments, and what callbacks have learnt. Each function rewrites a part
of a loaded checkpoint before Lightning reads it.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from aem_lightning.algorithms import RepoR
from aem_lightning.files import write_atomically
from aem_lightning.modules.lora import check_adapters, check_base

log = logging.getLogger(__name__)

# Options of torch's optimizers that read a state which a run without them does not keep.
STATEFUL_OPTIONS = ("amsgrad", "centered", "momentum")
UPDATES = "epoch_loop.manual_optimization.optim_step_progress"  # what `global_step` counts


def stored_state(agent: Any) -> dict[str, Any]:
    """What a checkpoint says of ``agent`` beside its weights."""
    names = ("iteration", "tasks_played", "entropy_coef", "first_entropy_coef", "config")
    optimizers = [] if agent._trainer is None else agent._trainer.optimizers
    classes = [_class_path(optimizer) for optimizer in optimizers]
    moved = asdict(agent.modulation) if isinstance(agent.modulation, RepoR) else None
    kept = {name: getattr(agent, name) for name in names}
    base = {"digest": agent.policy.base_digest, "name": agent.policy.causal_lm.name_or_path}
    return kept | {"optimizers": classes, "modulation": moved, "base": base}


def take_up(agent: Any, checkpoint: Mapping[str, Any]) -> None:
    """Give ``agent`` what `stored_state` has put into a checkpoint; earlier versions kept less.

    Raises:
        ValueError: The adapters in it do not fit the agent's policy, or are of other weights.
    """
    expected = {f"policy.{name}": p.shape for name, p in agent.policy.trainable().items()}
    check_adapters(expected, checkpoint["state_dict"])
    ours = checkpoint["aem_lightning"]
    check_base(agent.policy.base_digest, ours.get("base"))
    agent.iteration = ours["iteration"]
    before = ours["iteration"] * ours["config"].get("tasks_per_iteration", 0)
    agent.tasks_played = ours.get("tasks_played", before)
    first = agent.first_entropy_coef
    if ours.get("first_entropy_coef", first) == first:  # else another one was typed
        agent.entropy_coef = ours.get("entropy_coef", first)
    is_as_typed = ours["config"].get("modulation") == agent.config.get("modulation")
    if isinstance(agent.modulation, RepoR) and ours.get("modulation") and is_as_typed:
        agent.modulation = RepoR(**ours["modulation"])


def resume(agent: Any, checkpoint: dict[str, Any]) -> None:
    """Rewrite ``checkpoint``, of which ``agent`` has taken up its part, for the trainer's fit."""
    made = agent.configure_optimizers()
    fresh = made["optimizer"] if isinstance(made, dict) else made
    restart_loops(checkpoint, agent.trainer.datamodule, agent.iteration)
    keep_typed_options(checkpoint, fresh)
    take_over_callbacks(checkpoint, agent.trainer)


def advanced(schedule: LRScheduler, iterations: int) -> LRScheduler:
    """``schedule`` after so many iterations, as its own settings have it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for _ in range(iterations):
            schedule.step()
    return schedule


def restart_loops(checkpoint: dict[str, Any], data: Any, iteration: int) -> None:
    """Let the trainer begin an epoch at ``iteration``, wherever in an epoch the checkpoint is of.

    Epochs are blocks of ``data.iterations_per_epoch`` iterations, counted from the run's first one;
    the last may be shorter. What is left out of a loop's state starts anew.
    """
    if data is None:
        return
    epoch, more = divmod(iteration, data.iterations_per_epoch)
    if more and iteration == data.iterations:
        epoch += 1
    checkpoint["loops"]["fit_loop"] = {
        "epoch_progress": {"total": _all(epoch), "current": _all(epoch)},
        "epoch_loop.batch_progress": {
            "total": _all(iteration),
            "current": _all(0),
            "is_last_batch": False,
        },
        "epoch_loop.state_dict": {"_batches_that_stepped": iteration},  # the x axis of `val/`
        UPDATES: checkpoint["loops"]["fit_loop"][UPDATES],
    }


def _all(count: int) -> dict[str, int]:
    return dict.fromkeys(("ready", "started", "processed", "completed"), count)


def keep_typed_options(checkpoint: dict[str, Any], fresh: Optimizer) -> None:
    """Give the options of ``fresh`` (rate, decay, betas, ...) to the moments of the checkpoint.

    Moments of another class of optimizer, or those that lack what an option needs, are left behind
    with a warning. The schedule is not restored: that of ``fresh`` is where it has to be.
    """
    (saved,) = checkpoint["optimizer_states"]
    groups = fresh.state_dict()["param_groups"]
    (earlier,) = checkpoint["aem_lightning"].get("optimizers") or [None]
    reason = _why_not(saved["param_groups"], groups)
    if earlier not in (None, _class_path(fresh)):
        reason = f"The optimizer is {_class_path(fresh)}, and the checkpoint's was {earlier}"
    if reason is not None:
        log.warning("%s: its moments start from nothing", reason)
    state = saved["state"] if reason is None else {}
    checkpoint["optimizer_states"] = [{"state": state, "param_groups": groups}]
    checkpoint["lr_schedulers"] = []


def _why_not(saved: list[dict[str, Any]], groups: list[dict[str, Any]]) -> str | None:
    """Why moments kept under the options ``saved`` do not fit ``groups``; ``None``: they do."""
    if [len(group["params"]) for group in saved] != [len(group["params"]) for group in groups]:
        return "The optimizer has other groups of parameters than the checkpoint's"
    for before, now in zip(saved, groups, strict=True):
        for name in STATEFUL_OPTIONS:
            if now.get(name) and not before.get(name):
                return f"optimizer.{name}={now[name]} was {before.get(name)} in the checkpoint"
    return None


def _class_path(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def take_over_callbacks(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Make the state of Lightning's callbacks fit this run.

    The best checkpoints come along, see `bring_best`. An early stopping keeps the patience that was
    typed, and a time limit (``trainer.max_time``) is that of this command.
    """
    states = checkpoint.get("callbacks", {})
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        state = states.get(callback.state_key)
        if state is None:
            continue
        if isinstance(callback, ModelCheckpoint):
            beside = Path(str(trainer.ckpt_path)).parent
            states[callback.state_key] = bring_best(
                state, callback, beside, copies=trainer.is_global_zero
            )
        elif isinstance(callback, Timer):
            states[callback.state_key] = {}
        elif "patience" in state:
            state["patience"] = getattr(callback, "patience", state["patience"])


def bring_best(
    state: Mapping[str, Any], callback: ModelCheckpoint, beside: Path, *, copies: bool
) -> dict[str, Any]:
    """``state`` for the folder of ``callback``: its best checkpoints, copied, with their scores.

    A copy, so that nothing which either run does changes the other's. Who ``copies`` is rank zero.
    Those that are not where they were may be ``beside`` the checkpoint, in a folder that was moved.
    """
    folder, limit = Path(str(callback.dirpath)), callback.save_top_k
    known = {}
    for name, score in state["best_k_models"].items():
        places = (Path(name), beside / Path(name).name)
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            log.warning("%s is gone: the best checkpoint is looked for anew", name)
        else:
            known[path] = score
    found = sorted(known, key=lambda path: float(known[path]), reverse=callback.mode == "max")
    kept = found if limit < 0 else found[:limit]
    for path in kept if copies else ():
        if path.parent != folder:
            write_atomically(folder / path.name, path.read_bytes())
    scores = {str(folder / path.name): known[path] for path in kept}
    best, kth = (next(iter(names), "") for names in (scores, reversed(scores)))
    return {
        **state,
        "dirpath": callback.dirpath,
        "best_k_models": scores,
        "best_model_path": best,
        "best_model_score": scores.get(best),
        "kth_best_model_path": kth,
        "kth_value": scores.get(kth, callback.kth_value),
        "last_model_path": "",
    }
