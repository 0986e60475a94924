"""What to type after a run: commands that work as printed, with no environment activated."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from aem_lightning.runner.shipped import CHECKOUT, from_install, shipped
from aem_lightning.runner.trust import literal, typed_again

# What belongs to one run alone, and not to the one that goes on from it.
OF_ONE_RUN = ("ckpt_path", "paths.output_dir", "stage")


def command(*words: str) -> str:
    """``python`` and ``words`` for a shell in this folder.

    It names the interpreter that runs, unless that is the ``python`` which this shell finds.
    """
    return shlex.join([_found("python", Path(sys.executable)), *words])


def override(key: str, value: Any) -> str:
    """``key=value`` as Hydra's grammar takes it, whatever characters the value holds."""
    return f"{key}={_written(literal(value) if isinstance(value, str) else value)}"


def after_training(cfg: DictConfig, checkpoint: Path) -> list[str]:
    """The evaluation of ``checkpoint``, and the curves."""
    root, data = str(cfg.paths.root_dir), str(cfg.paths.data_dir)
    usual = root == os.environ.get("AEM_LIGHTNING_ROOT", ".")
    words = [] if usual else [override("paths.root_dir", root)]
    if data != f"{root}/data":  # else it would make the warm start again
        words.append(override("paths.data_dir", data))
    if cfg.seed != 0:  # an evaluation's own: with it, the summary's figure comes out again
        words.append(override("seed", cfg.seed))
    return [
        _typed("eval", *words, *typed_again(cfg), override("ckpt_path", str(checkpoint))),
        command("-m", "tensorboard.main", "--logdir", str(Path(cfg.paths.log_dir))),
    ]


def after_warm_start(model: Path, cfg: DictConfig | None = None) -> list[str]:
    """The run that goes on from ``model``: the overrides of this one (``cfg``), without a stage."""
    given = [] if cfg is None else overrides_of(cfg)
    words = _without(given, (*OF_ONE_RUN, "policy.model"))
    stage_of_its_own = "experiment=alfworld_warm_start"
    words = ["experiment=alfworld_aem" if word == stage_of_its_own else word for word in words]
    return [_typed("train", *words, override("policy.model", str(model)))]


def to_continue(cfg: DictConfig, checkpoint: Path) -> str:
    """The command that goes on from ``checkpoint`` with the overrides of this run."""
    words = _without(overrides_of(cfg), OF_ONE_RUN)
    return _typed("train", *words, override("ckpt_path", str(checkpoint)))


def train_instead(cfg: DictConfig, changes: Mapping[str, Any]) -> str:
    """The command of ``cfg`` with other ``changes``, options or groups, in the place of its own."""
    words = _without(overrides_of(cfg), [*changes, "paths.output_dir"])
    return _typed("train", *words, *(override(key, value) for key, value in changes.items()))


def overrides_of(cfg: DictConfig) -> list[str]:
    """The overrides that make ``cfg`` of ``configs/train.yaml``.

    Those that were typed; for a config from Python, whatever differs from one without any.
    """
    if HydraConfig.initialized() and HydraConfig.get().job.config_name == "train":
        return typed_overrides()
    # An analysis trains inside a command of its own, which knows the same configs.
    known, configs = GlobalHydra.instance().is_initialized(), str(shipped("configs"))
    with nullcontext() if known else initialize_config_dir(configs, version_base="1.3"):
        wanted: Any = OmegaConf.to_container(cfg, resolve=False)
        words = list(_changes(_plain_config(()), wanted))
        # A DataModule's file chooses prompt and rewards, too: without it the rest is another.
        if gone := [word for word in words if re.fullmatch(r"~\w+", word)]:
            words = [*gone, *_changes(_plain_config(gone), wanted)]
    return words


def typed_overrides() -> list[str]:
    """The overrides of the command that runs, places to search first."""
    given = HydraConfig.get().overrides
    places = [word for word in given.hydra if word.lstrip("+").startswith("hydra.searchpath=")]
    return [*places, *given.task]


def config_folders() -> list[str]:
    """``--config-dir`` and its folder, where that was typed."""
    if not HydraConfig.initialized():
        return []
    sources = HydraConfig.get().runtime.config_sources
    own = [source.path for source in sources if source.provider == "command-line"]
    return [word for folder in own for word in ("--config-dir", folder)]


def _plain_config(words: Sequence[str]) -> Any:
    return OmegaConf.to_container(compose("train", [*words]), resolve=False)


def _changes(base: Any, wanted: Any, prefix: str = "") -> Iterable[str]:
    """The overrides that turn the plain ``base`` into ``wanted``."""
    yield from (f"~{key}" for key in base if key not in wanted)
    for key, value in wanted.items():
        name, is_node = f"{prefix}{key}", isinstance(value, dict)
        if key not in base:
            yield f"+{name}={_written(value)}"
        elif is_node and isinstance(base[key], dict) and not _lacks(value, base[key]):
            yield from _changes(base[key], value, f"{name}.")
        elif is_node and not prefix and base[key] is not None:  # another option of the group
            # Hydra deletes no null, inside or at the top.
            yield from (f"~{name}", f"+{name}={_written(value)}")
        elif value != base[key]:
            yield f"{name}={_written(value)}"


def _lacks(node: dict[Any, Any], base: dict[Any, Any]) -> bool:
    """Whether ``base`` has a key, at any depth, that ``node`` has not."""
    return any(
        key not in node
        or (isinstance(value, dict) and isinstance(node[key], dict) and _lacks(node[key], value))
        for key, value in base.items()
    )


def _without(words: Sequence[str], keys: Sequence[str]) -> list[str]:
    return [word for word in words if word.lstrip("+~").partition("=")[0] not in keys]


def _written(value: Any, inside: bool = False) -> str:
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_written(value[key], inside=True)}' for key in value)}}}"
    if isinstance(value, list | tuple):
        return f"[{','.join(_written(item, inside=True) for item in value)}]"
    if not isinstance(value, str):
        return "null" if value is None else str(value).lower()
    bare = not inside and _is_bare(value)
    return value if bare else QuotedString(value, Quote.single).with_quotes()


def _is_bare(text: str) -> bool:
    """Whether Hydra reads ``text`` as itself without quotes."""
    try:
        return bool(OverridesParser.create().parse_override(f"key={text}").value() == text)
    except (HydraException, ValueError):
        return False


def _typed(name: str, *words: str) -> str:
    """``python train.py`` or ``aem-train``, or their like, with ``words`` and a folder of options.

    The script stands beside the one that runs, or in this folder or checkout.
    """
    words = (*words, *config_folders())
    if from_install():
        name = f"aem-{name}"
        # Beside the command that runs: scripts need not lie where the interpreter does.
        running = (Path(sys.argv[0]).absolute(), Path(sys.executable))
        beside = (place.with_name(name) for place in running)
        file = next((place for place in beside if place.is_file()), None)
        return shlex.join([name if file is None else _found(name, file), *words])
    places = (folder / f"{name}.py" for folder in (Path(sys.argv[0]).parent, Path(), CHECKOUT))
    return command(str(next((place for place in places if place.is_file()), f"{name}.py")), *words)


def _found(name: str, file: Path) -> str:
    """``name``, where this shell finds ``file`` by it, or else the path of ``file``."""
    found = Path(shutil.which(name) or os.devnull).absolute()
    if found.parent == file.parent and found.samefile(file):
        return name
    here = Path.cwd()
    return str(file.relative_to(here) if file.is_relative_to(here) else file)
