"""What ``eval.py`` plays, by its words: a checkpoint, a model with its adapter, or an endpoint.

A checkpoint and an endpoint have the options of ``configs/eval.yaml``. A model brings no settings
with it: it is played on any experiment, with the options of ``configs/train.yaml`` beside a few of
the evaluation's own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

API = "policy=api"
# Options of the evaluation of a checkpoint that train.yaml has under another name, or lacks.
_WISHES = {
    "temperature": "eval_temperature",
    "adapter": "+adapter",
    "repeats": "+repeats",
    "splits": "+splits",
}
_OF_CHECKPOINT = ("ckpt_path", "run", "overrides")
_OF_MODEL = ("policy", "adapter", "experiment")


def plays_model(words: Sequence[str]) -> bool:
    """Whether the overrides ``words`` are about a model."""
    return API not in words and bool(_about(words, _OF_MODEL))


def contradiction(words: Sequence[str]) -> str | None:
    """What to type where ``words`` name two things to play, or half of one."""
    checkpoint, model = _about(words, _OF_CHECKPOINT), _about(words, _OF_MODEL)
    where = [word for word in words if re.match(r"\+*(datamodule|prompt)=", word)]
    if where and not model and API not in words:
        return (
            f"{where[0]}: who is to play there? Type policy.model=<folder>, adapter=<folder> or "
            f"{API} beside it. A checkpoint is played where its run was, or with single settings "
            "changed: 'overrides=[\"datamodule.root=/data/alfworld\"]'"
        )
    if model == ["policy=tiny"] and not _about(words, ("datamodule",)):
        return (
            "policy=tiny: an evaluation plays the policy of its checkpoint (ckpt_path=<file>), a "
            "model (policy.model=<folder>, adapter=<folder>) or one behind an endpoint (policy=api "
            "base_url=... model=...). A tiny one is made by the warm start of an experiment: type "
            "experiment=quickstart"
        )
    if API in words:
        others = [word for word in (*checkpoint, *model) if word != API]
        if others:
            return (
                f"{API} {others[0]}: a model behind an endpoint is named by model=..., and has no "
                f"checkpoint, adapter or experiment here. Type {API} without {others[0]}, or "
                f"{others[0]} without {API}"
            )
    elif checkpoint and model:
        told = (
            f"{checkpoint[0]} {model[0]}: a checkpoint is played with the model, adapter and "
            "settings of its training run. Type one of them alone"
        )
        changed = [word.lstrip("+") for word in model if re.match(r"\+*policy\.", word)]
        if changed:  # Hydra wants quotes around an equals sign inside a list
            told += f"; the run's own is changed by 'overrides=[\"{changed[0]}\"]'"
        return told
    return None


def as_training(words: Sequence[str]) -> list[str]:
    """``words`` about a model as overrides of ``configs/train.yaml``.

    With an adapter whose model is not typed, no experiment's model takes its place.
    """
    given: list[str] = []
    for word in words:
        key, equals, value = word.lstrip("+").partition("=")
        if key in _WISHES and equals and value != "null":
            given.append(f"{_WISHES[key]}={value}")
        elif key not in (*_WISHES, *_OF_CHECKPOINT):  # which are null here
            given.append(word)
    ours = [] if _about(words, ("name",)) else ["name=eval"]
    if _about(words, ("adapter",)) and not any(re.match(r"\+*policy\.model=", w) for w in words):
        ours.append("policy.model=null")
    first = next((i for i, word in enumerate(given) if "=" in word and word[0] != "-"), 0)
    return [*given[:first], *ours, *given[first:]]


def _about(words: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Those of ``words`` that give one of ``keys``, or a key below it, a value."""
    pattern = re.compile(rf"\+*({'|'.join(keys)})(\.[^=]*)?=(?!(null|\[\])$)")
    return [word for word in words if pattern.match(word)]
