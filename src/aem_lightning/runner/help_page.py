"""The page of ``--help``: groups, options, and the comments that stand beside them in YAML."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from aem_lightning.runner.overrides import options_of
from aem_lightning.runner.shipped import as_typed

if TYPE_CHECKING:
    from aem_lightning.runner.command import Command

VALUE_WIDTH = 24
KEY = re.compile(r"(?P<key>\w+):(?P<rest>.*)")
GROUP = re.compile(r"\s+- (override )?/?(?P<key>[\w/]+):(?P<rest>.*)")
BESIDE = re.compile(r"(?:^|\s)# (.*)")


@dataclass
class Comments:
    """The comments of a YAML file.

    Attributes:
        header: What stands before the first line that is none.
        beside: What stands beside a top-level key or a group of the defaults list.
        above: What stands in lines of its own above a top-level key.
        parents: Files of the same folder that the defaults list takes in.
    """

    header: str = ""
    beside: dict[str, str] = field(default_factory=dict)
    above: dict[str, str] = field(default_factory=dict)
    parents: list[str] = field(default_factory=list)


def read_comments(path: Path) -> Comments:
    """The comments of the YAML file ``path``.

    A line of its own that starts with a small letter goes on with the comment right above it.
    """
    found, last, begun = Comments(), "", False
    block: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            words = line.lstrip("# ")
            if last in found.beside and words[:1].islower() and not block:
                found.beside[last] += f" {words}"
            elif not words.startswith("@package"):
                block.append(words)
            continue
        if not begun:
            found.header, begun, block = " ".join(block), True, []
        if entry := KEY.match(line) or GROUP.match(line):
            last = entry["key"]
            if block:
                found.above[last] = " ".join(block)
            if comment := BESIDE.search(entry["rest"]):
                found.beside[last] = comment[1]
        else:
            last = ""
            found.parents += re.findall(r"^\s+- (\w+)$", line)
        block = []
    return found


def first_sentence(path: Path) -> str:
    """The first sentence of the header of a YAML file."""
    return re.split(r"(?<=[.?!])\s", read_comments(path).header)[0]


def show_help(command: Command, composed: DictConfig) -> None:
    """Print the help of ``command``, with the values that its overrides lead to."""
    comments = list(_all_comments(command.file(f"{command.name}.yaml")))
    choices = composed.hydra.runtime.choices
    for group, option in choices.items():
        path = command.file(f"{group}/{option}.yaml")
        if path.is_file() and "@package _global_" in path.read_text(encoding="utf-8"):
            comments += _all_comments(path)  # as of policy=api: its keys are the config's
    console = Console(markup=False, highlight=False)
    console.print(as_typed(command.about.strip().replace("``", "`")))
    if comments[0].header:
        console.print(f"\n{as_typed(comments[0].header)}")
    typed = as_typed(command.typed)
    console.print("\nGroups, as group=option; * is taken now")
    console.print(_groups(choices, comments))
    console.print("\nOptions, as key=value")
    for part in _options(composed, comments):
        console.print(part)
    console.print(
        f"\nAll keys, nested ones too: {typed} --cfg job\n"
        f"Files of your own, which come first: {typed} --config-dir FOLDER; aem-configs FOLDER "
        "copies the project's into it\n"
        f"Hydra's own flags: {typed} --hydra-help\n"
        "logs/ and data/ go into this folder, or that of paths.root_dir=... or AEM_LIGHTNING_ROOT"
    )


def _all_comments(path: Path) -> Iterator[Comments]:
    """The comments of ``path`` and of the files of its folder that it builds on."""
    own = read_comments(path)
    yield own
    for parent in own.parents:
        if (file := path.with_name(f"{parent}.yaml")).is_file():
            yield from _all_comments(file)


def _groups(choices: DictConfig, comments: Sequence[Comments]) -> Table:
    """A line for each group: its options, and what stands beside it."""
    table = Table.grid(padding=(0, 2))
    for group in sorted(name for name in map(str, choices) if not name.startswith("hydra")):
        line = ", ".join(f"{o}*" if o == choices[group] else o for o in options_of(group))
        beside = next((c.beside[group] for c in comments if group in c.beside), None)
        table.add_row(f"  {group}:", f"{line} # {beside}" if beside else line)
    return table


def _options(composed: DictConfig, comments: Sequence[Comments]) -> Iterator[Table | Padding]:
    """Tables of key, value and comment, and what stands in lines of its own above a key."""
    groups = composed.hydra.runtime.choices
    values = OmegaConf.to_container(composed)
    assert isinstance(values, dict)
    shown = {str(k): _shown(v) for k, v in values.items() if k not in groups and k != "hydra"}
    widths = 2 + max(map(len, shown)), min(VALUE_WIDTH, max(map(len, shown.values())))
    table = _three_columns(*widths)
    for key, value in shown.items():
        if above := next((c.above[key] for c in comments if key in c.above), None):
            yield table
            yield Padding(above, (0, 0, 0, 2))
            table = _three_columns(*widths)
        beside = next((c.beside[key] for c in comments if key in c.beside), "")
        table.add_row(f"  {key}", value, beside)
    yield table


def _three_columns(first: int, second: int) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(width=first)
    table.add_column(width=second, overflow="fold")
    table.add_column(overflow="fold")
    return table


def _shown(value: Any) -> str:
    """A value as it stands in YAML; of a mapping the keys alone."""
    if isinstance(value, dict):
        return f"{{{', '.join(value)}}}"
    return value if isinstance(value, str) else json.dumps(value)
