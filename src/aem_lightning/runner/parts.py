"""Parts by the name of a class: whether it is found, takes its arguments, and fits its place."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from aem_lightning.algorithms import Estimator, Loss, Modulation
from aem_lightning.runner.checks import refuse

PROTOCOLS = {"advantage": Estimator, "modulation": Modulation, "loss": Loss}
BASES = {"callbacks": Callback, "logger": Logger}


def check_classes(cfg: DictConfig) -> None:
    """Look at the classes that ``cfg`` names for an algorithm, callbacks and loggers.

    Raises:
        ConfigError: Every class that is not found, does not take its arguments, or lacks what its
            place asks for.
    """
    problems: list[str] = []
    for group, protocol in PROTOCOLS.items():
        problems += [*_problems(group, cfg[group])] or [*_lacking(group, cfg[group], protocol)]
    for group, base in BASES.items():
        for name, node in (cfg[group] or {}).items():
            problems += [] if node is None else _problems(f"{group}.{name}", node, base)
    refuse(problems)


def _problems(key: str, node: Any, base: type = object) -> Iterator[str]:
    """What is wrong with the class and arguments of ``node``, at ``key``, and of nodes in it."""
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    if target is None:
        yield f"{key}={node}: which class? type {key}._target_=my_package.MyClass"
        return
    try:
        made = instantiate({"_target_": target, "_partial_": True}).func
    except InstantiationException as error:
        reason = " ".join(str(error.__cause__ or error).split())
        yield (
            f"{key}._target_={target}: {reason} Type the class of a module that Python finds: "
            "install its package, or put PYTHONPATH=<its folder> before the command"
        )
        return
    if isinstance(made, type) and not issubclass(made, base):
        yield f"{key}._target_={target}: not a {base.__module__}.{base.__name__}, as it has to be"
    yield from _wrong_arguments(key, node, inspect.signature(made))
    for name in map(str, node):
        inner = None if OmegaConf.is_missing(node, name) else node[name]
        if isinstance(inner, DictConfig) and "_target_" in inner:
            yield from _problems(f"{key}.{name}", inner)


def _wrong_arguments(key: str, node: DictConfig, signature: inspect.Signature) -> Iterator[str]:
    """Arguments of ``node`` that the signature lacks, and those it needs that are not given."""
    parameters = signature.parameters.values()
    given = [str(name) for name in node if not OmegaConf.is_missing(node, name)]
    allowed = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if all(p.kind is not p.VAR_KEYWORD for p in parameters):
        known = ", ".join(f"{key}.{name}" for name in allowed) or "none"
        for name in given:  # _target_ and the like are Hydra's
            if not name.startswith("_") and name not in allowed:
                yield f"{key}.{name}={node[name]}: there is no such argument. Allowed: {known}"
    if not node.get("_partial_"):
        needed = [p.name for p in parameters if p.name in allowed and p.default is p.empty]
        for name in needed:
            if name not in given:
                plus = "" if name in node.keys() else "+"  # noqa: SIM118 (`in` passes over ???)
                yield f"{key}.{name} is not given: type {plus}{key}.{name}=..."


def _lacking(group: str, node: DictConfig, protocol: type) -> Iterator[str]:
    """What the protocol's properties say that the part of ``group`` has to have, and lacks."""
    try:
        part = instantiate(node, _convert_="all")
    except InstantiationException as error:
        if not isinstance(error.__cause__, TypeError):
            raise
        given = ", ".join(f"{group}.{name!s}={value}" for name, value in node.items())
        yield f"{group}: {error.__cause__}. Given: {given}"
        return
    shown = f"See {protocol.__module__}.{protocol.__name__} and docs/extending.md"
    if not callable(part):
        yield f"{group}._target_={node._target_}: it has no __call__. {shown}"
    for name, member in vars(protocol).items():
        if not isinstance(member, property):
            continue
        kind = get_type_hints(member.fget)["return"]
        allowed = get_args(kind)
        value = getattr(part, name, None)
        if value not in allowed if allowed else not isinstance(value, kind):
            wanted = f"one of {', '.join(allowed)}" if allowed else f"of type {kind.__name__}"
            yield (
                f"{group}._target_={node._target_}: it needs {name}, {wanted}, and has "
                f"{'none' if value is None else repr(value)}. {name}: {inspect.getdoc(member)} "
                f"{shown}"
            )
