"""What to say of overrides that cannot be: what was given, what is allowed, what to type."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from aem_lightning.runner.shipped import shipped

API = "policy=api"


def wrong_flag(given: str, known: Sequence[str], typed: str) -> str:
    """What to say of an argument that is neither one of Hydra's flags nor an override."""
    if not given.startswith("-"):
        return f"{given}: overrides stand side by side. Type the flags behind all of them"
    key = given.lstrip("-")
    if "=" in key:
        return f"{given}: options take no dashes. Type {key}"
    hint = _did_you_mean(difflib.get_close_matches(given, known, n=1))
    return f"{given}: there is no such flag. {hint}Options are key=value: {typed} --help"


def without_equals(given: Sequence[str]) -> str | None:
    """What to say of an argument that is no ``key=value``, if there is one."""
    bare = [a for a in given if a.startswith("=") or ("=" not in a and not a.startswith("~"))]
    if not bare:
        return None
    word = re.escape(bare[0])
    pieces = rf"{word}\s*=\s*\S+" if bare[0] != given[-1] else rf"[^\s=]+\s*=\s*{word}"
    torn = re.search(rf"(^|(?<=\s))({pieces})", " ".join(given))
    if torn and torn[2] not in given:
        whole = re.sub(r"\s*=\s*", "=", torn[2])
        return f"{torn[2]}: no blanks around the equals sign. Type {whole}"
    homes = [group for group in _groups() if bare[0] in options_of(group)]
    hint = _did_you_mean([f"{group}={bare[0]}" for group in homes])
    return f"{bare[0]}: an override is key=value. {hint or f'Type {bare[0]}=...'}".rstrip()


def given_twice(given: Iterable[str]) -> dict[str, list[str]]:
    """The values of keys that have more than one of them, by key."""
    values: dict[str, list[str]] = {}
    for argument in given:
        key, _, value = argument.lstrip("+").partition("=")
        values.setdefault(key, []).append(value)
    return {key: found for key, found in values.items() if len(set(found)) > 1}


def explained(error: Exception, name: str, given: Sequence[str], typed: str) -> str:
    """What to type instead of ``given``, which the config ``name`` cannot be composed with."""
    if API in given and name != "eval":
        return f"{API}: such a model can be played, not trained. Type python eval.py {API} ..."
    if isinstance(error, MissingConfigException) and error.options:
        return _wrong_option(error.missing_cfg_file or "", error.options, given)
    cause = error.__cause__
    if isinstance(error, ConfigCompositionException) and isinstance(cause, OmegaConfBaseException):
        return f"{_unknown_key(cause, name, given)}All keys: {typed} --cfg job"
    if not isinstance(error, ConfigCompositionException | MissingConfigException):
        # Hydra does not say which of them it takes for no option: first what is no word at all.
        for argument in sorted(given, key=_is_word):
            group = argument.partition("=")[0].lstrip("+")
            words = argument.partition("=")[2].strip("[]").split(",")
            if group in _groups() and not set(words) <= set(options_of(group)):
                file = argument.lstrip("+").replace("=", "/", 1)
                return _wrong_option(file, options_of(group), given)
    words = [str(error), *([] if cause is None else [str(cause)]), f"Given: {' '.join(given)}"]
    return "\n".join(words)


def _is_word(argument: str) -> bool:
    try:
        value = OverridesParser.create().parse_override(argument).value()
    except HydraException:
        return True
    return isinstance(value, str | list)


def stray_key(composed: DictConfig, file: Path, given: Sequence[str]) -> str | None:
    """What to say of a key that nothing reads, and ``file`` lacks: in a file, Hydra takes any.

    One that was added with a plus was meant, and so was one that another key of any file refers to,
    though that key be typed.
    """
    own = OmegaConf.load(file)
    known = {*map(str, own), *composed.hydra.runtime.choices, "hydra"}
    added = [argument.lstrip("+").split("=")[0].split(".")[0] for argument in given]
    strange = [key for key in map(str, composed) if key not in known and key not in added]
    sources = composed.hydra.runtime.config_sources if strange else []
    folders = [Path(source.path) for source in sources if source.schema == "file"]
    files = [path for folder in folders for path in folder.rglob("*.yaml")]
    written = "".join(path.read_text(encoding="utf-8") for path in files)
    for key in strange:
        if not re.search(rf"\${{{re.escape(key)}\b", written):
            close = difflib.get_close_matches(key, sorted(known), n=3)
            hint = _did_you_mean(close) or "Remove it."
            return f"{key}: a file of this config sets it, and nothing reads such a key. {hint}"
    return None


def _wrong_option(file: str, options: Sequence[str], given: Sequence[str]) -> str:
    """What to type instead of ``group=option``, whose file would be ``group/option``."""
    group, _, option = file.rpartition("/")
    argument = f"{group}={option}"
    for each in given:
        if each.lstrip("+").replace("=", "/", 1) == file:  # an option may have a slash itself
            argument = each
            group, _, option = each.lstrip("+").partition("=")
    if (now := _renamed(argument)) is not None:
        return f"{argument} has another name now: type {now}"
    hint = _did_you_mean(f"{group}={o}" for o in difflib.get_close_matches(option, options))
    if file == "hydra/sweeper/optuna":  # hparams_search=, which a plugin of Hydra's carries out
        hint = "To install Optuna, type: pip install 'aem-lightning[sweep]'. "
    return f"{argument}: there is no such option. {hint}Allowed: {', '.join(options)}."


def _renamed(argument: str) -> str | None:
    """What stands beside an option of an earlier version in the table of names."""
    table = shipped("docs/names.md")
    lines = table.read_text(encoding="utf-8").splitlines() if table.is_file() else []
    named = [line for line in lines if line.startswith("|") and f"`{argument}`" in line]
    rows = (line.strip("|").split("|") for line in named)
    return next((cells[1].strip().replace("`", "") for cells in rows), None)


def _unknown_key(cause: OmegaConfBaseException, name: str, given: Sequence[str]) -> str:
    """What to say of a key that the config lacks, with those that are like it."""
    key, parent = str(cause.full_key), cause.parent_node
    argument = next((a for a in given if a.lstrip("+~").partition("=")[0].startswith(key)), key)
    typed_key = argument.lstrip("+~").partition("=")[0]
    if cause.key is None and isinstance(parent, DictConfig):  # no mapping in a mapping's place
        inner = ", ".join(f"{key}.{name!s}" for name in parent)
        return f"{argument}: a mapping of keys to values. Its keys: {inner}. "
    prefix = key.removesuffix(str(cause.key))  # "loss." of loss.clip_hihg
    plain = OmegaConf.to_container(parent) if isinstance(parent, DictConfig) else {}
    known = [f"{prefix}{k}" for k in _dotted(plain) if not f"{prefix}{k}".startswith("hydra")]
    if name == "eval" and typed_key in _dotted(OmegaConf.to_container(compose(name, [API]))):
        return (
            f"{argument}: an option of {API}. A checkpoint has its training run's own; change "
            f"those by 'overrides=[{argument}]'. "
        )
    same_word = [k for k in known if k.rpartition(".")[2] == typed_key]
    groups = [] if prefix else _groups()
    close = difflib.get_close_matches(typed_key, [*groups, *known], n=3, cutoff=0.7)
    hint = _did_you_mean(dict.fromkeys([*same_word, *close]))
    return f"{argument}: the config has no such key. {hint}"


def _did_you_mean(words: Iterable[str]) -> str:
    told = " or ".join(words)
    return f"Did you mean {told}? " if told else ""


def options_of(group: str, kind: ObjectType = ObjectType.CONFIG) -> list[str]:
    """The options of a group, of ours and of installed packages.

    Not by Hydra's ``get_group_options``, which copies every config that it has read, each time.
    """
    sources = GlobalHydra.instance().config_loader().get_sources()
    return sorted({o for s in sources if s.is_group(group) for o in s.list(group, kind)})


def _groups() -> list[str]:
    """The groups of options; Hydra's own are left out."""
    return [group for group in options_of("", ObjectType.GROUP) if group != "hydra"]


def _dotted(node: Any, prefix: str = "") -> list[str]:
    """The dotted keys of a plain container."""
    if not isinstance(node, dict):
        return []
    keys: list[str] = []
    for name, value in node.items():
        keys += [f"{prefix}{name}", *_dotted(value, f"{prefix}{name}.")]
    return keys
