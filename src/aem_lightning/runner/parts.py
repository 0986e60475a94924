"""Parts by the name of a class: whether it is found, takes its arguments, and fits its place."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import Any, get_args, get_type_hints

import hydra
import torch
from hydra.errors import HydraException
from lightning import Trainer
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from aem_lightning.algorithms import Estimator, Loss, Modulation
from aem_lightning.datamodules import AgentDataModule
from aem_lightning.runner.checks import ConfigError, refuse, resolved, unresolved
from aem_lightning.runner.schema import (
    arguments_of,
    fits_class,
    shown,
    wrong_value,
)

# What the classes of a group's option have to be; those of a protocol are made, and looked at.
PROTOCOLS = {"advantage": Estimator, "modulation": Modulation, "loss": Loss}
SINGLE = {
    "datamodule": AgentDataModule,
    "prompt": object,
    "engine": object,
    "rewards": object,
    "optimizer": torch.optim.Optimizer,
    "scheduler": torch.optim.lr_scheduler.LRScheduler,
    "trainer": Trainer,
    **dict.fromkeys(PROTOCOLS, object),
}
SEVERAL = {"callbacks": Callback, "logger": Logger}
# Loggers of Lightning's whose packages are optional, as the extras are.
EXTRAS = {"WandbLogger": "wandb", "MLFlowLogger": "mlflow"}
# The module calls these with what it alone has.
PARTIAL = ("optimizer", "scheduler")


def check_classes(cfg: DictConfig, groups: Iterable[str] = (*SINGLE, *SEVERAL)) -> None:
    """Look at the classes that ``cfg`` names, and at the arguments that it has for them.

    Raises:
        ConfigError: Every class that is not found or lacks what its place asks for, and every
            argument that is unknown, not given, or of a value that its annotation does not take.
    """
    problems: list[str] = []
    for group in groups:
        if cfg.get(group) is None:  # checks says which of them may be null
            continue
        try:
            problems += _of_several(group, cfg) if group in SEVERAL else _of_one(group, cfg)
        except OmegaConfBaseException as error:
            problems.append(unresolved(group, error))
    refuse(problems)


def made(key: str, node: Any, *arguments: Any, **options: Any) -> Any:
    """What ``node``, which stands at ``key``, makes of ``arguments`` and ``options`` too.

    Raises:
        ConfigError: It cannot be made; the message names ``key`` and what it was given.
    """
    try:
        if not arguments and not options:
            return hydra.utils.instantiate(node, _convert_="all")
        # Not through Hydra: it would take objects for configs, and some loggers look like one.
        return hydra.utils.instantiate(node, _convert_="all", _partial_=True)(*arguments, **options)
    except Exception as error:  # whatever a class of anyone's says to its arguments
        cause: BaseException = error
        while isinstance(cause, HydraException) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, ValueError) and f"{key}." in str(cause):
            raise ConfigError(str(cause)) from error
        inner = re.search(r"full_key: (\S+)", str(error))  # Hydra's, of a node inside
        place = inner[1] if inner and inner[1].startswith(key) else key
        kind = "" if isinstance(cause, ValueError | TypeError) else f"{type(cause).__name__}: "
        raise ConfigError(f"{place}: {kind}{cause}. Given: {_given(key, node)}") from error


def _given(key: str, node: Any) -> str:
    values: Any = OmegaConf.to_container(node) if OmegaConf.is_config(node) else node
    names = [str(name) for name in values if str(name)[0] != "_"] or [*values]
    return ", ".join(f"{key}.{name}={shown(values[name])}" for name in names)


def _of_several(group: str, cfg: DictConfig) -> list[str]:
    nodes = {f"{group}.{name!s}": node for name, node in cfg[group].items()}
    kept = {key: node for key, node in nodes.items() if node is not None}  # null drops it
    return [words for key, node in kept.items() for words in _problems(key, node, SEVERAL[group])]


def _of_one(group: str, cfg: DictConfig) -> list[str]:
    found = [*_problems(group, cfg[group], SINGLE[group]), *_partial(group, cfg[group])]
    if not found and group in PROTOCOLS:
        return [*_lacking(group, cfg[group], PROTOCOLS[group])]
    return found


def _partial(group: str, node: DictConfig) -> Iterator[str]:
    """What is wrong with ``_partial_`` of the option of a group."""
    wanted = group in PARTIAL
    given = node.get("_partial_", False)
    if given is not wanted:
        yield f"{group}._partial_={given}: type {group}._partial_={str(wanted).lower()}"
    if group == "optimizer" and node.get("lr") is None:
        yield "optimizer.lr is not given: type +optimizer.lr=2e-5"  # torch has one of its own


def _problems(key: str, node: Any, base: type = object) -> Iterator[str]:
    """What is wrong with the class and arguments of ``node``, at ``key``, and of nodes in it."""
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    if not isinstance(target, str):
        yield f"{key}={shown(node)}: which class? type {key}._target_=my_package.MyClass"
        return
    try:
        called = hydra.utils.instantiate({"_target_": target, "_partial_": True}).func
    except Exception as error:  # importing it runs code of anyone's
        reason = " ".join(str(error.__cause__ or error).split())
        yield (
            f"{key}._target_={target}: {reason} Type the class of a module that Python finds: "
            "install its package, or put PYTHONPATH=<its folder> before the command"
        )
        return
    if isinstance(called, type) and not issubclass(called, base):
        yield f"{key}._target_={target}: not a {base.__module__}.{base.__name__}, as it has to be"
        return
    package = EXTRAS.get(getattr(called, "__name__", ""))
    if package is not None and find_spec(package) is None:
        yield (
            f"{key} needs the package {package}, which is missing: type "
            f"pip install 'aem-lightning[{package}]', or {key}=null to go without"
        )
    yield from _wrong_arguments(key, node, called)


def _wrong_arguments(key: str, node: DictConfig, called: Any) -> Iterator[str]:
    """Arguments of ``node`` that what it calls lacks, does not take, or needs and has not got."""
    known, takes_any = arguments_of(called)
    problems: list[str] = []
    if "_args_" in node:
        yield f"{key}._args_={shown(node._args_)}: give arguments by their names"
    given = [str(name) for name in node if not OmegaConf.is_missing(node, name)]
    for name in given:  # _target_ and the like are Hydra's
        where = f"{key}.{name}"
        if name.startswith("_"):
            continue
        if name not in known:
            if not takes_any:
                allowed = ", ".join(f"{key}.{other}" for other in known) or "none"
                yield f"{where}={node[name]}: there is no such argument. Allowed: {allowed}"
            continue
        inner = node._get_node(name)
        value = resolved(node, name, problems)
        if isinstance(inner, DictConfig) and "_target_" in inner:
            yield from _nested(where, inner, known[name].annotation)
        elif "_target_" not in str(value):  # a list of nodes: it is made, and shows then
            yield from wrong_value(where, value, known[name].annotation, known[name].default)
    yield from problems
    if not node.get("_partial_"):
        for name, parameter in known.items():
            if parameter.default is parameter.empty and name not in given:
                plus = "" if name in node.keys() else "+"  # noqa: SIM118 (`in` passes over ???)
                yield f"{key}.{name} is not given: type {plus}{key}.{name}=..."


def _nested(key: str, node: DictConfig, annotation: Any) -> Iterator[str]:
    found = [*_problems(key, node)]
    yield from found
    if not found and not node.get("_partial_"):
        called = hydra.utils.instantiate({"_target_": node._target_, "_partial_": True}).func
        if isinstance(called, type) and not fits_class(called, annotation):
            yield f"{key}._target_={node._target_}: it does not fit there, where {annotation} does"


def _lacking(group: str, node: DictConfig, protocol: type) -> Iterator[str]:
    """What the protocol's properties say that the part of ``group`` has to have, and lacks."""
    try:
        part = made(group, node)
    except ConfigError as error:
        yield str(error)
        return
    see = f"See {protocol.__module__}.{protocol.__name__} and docs/extending.md"
    if not callable(part):
        yield f"{group}._target_={node._target_}: it has no __call__. {see}"
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
                f"{see}"
            )
