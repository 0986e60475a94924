"""Packages, of ``examples/`` or others, as an editable install leaves them."""

from __future__ import annotations

import contextlib
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import ROOT

EXAMPLES = ROOT / "examples"


@contextlib.contextmanager
def installed(name: str, site: Path, where: Path = EXAMPLES) -> Iterator[Path]:
    """The folder of the package ``name``, on the path, its entry points in the folder ``site``."""
    source = where / name
    project = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = site / f"{name}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    sections = []
    for group, entries in project["entry-points"].items():
        sections += [f"[{group}]", *(f"{key} = {value}" for key, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(sections) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        patch.syspath_prepend(str(source))
        try:
            yield source
        finally:
            for module in [m for m in sys.modules if m.partition(".")[0] == name]:
                del sys.modules[module]
