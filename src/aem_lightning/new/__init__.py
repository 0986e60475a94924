"""The start of a package of one's own, written as files that work at once."""

from __future__ import annotations

import errno
import keyword
import os
import re
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from string import Template

TEMPLATES = Path(__file__).parent / "templates"
# Templates and what becomes of them.
FILES = {
    "pyproject.txt": "pyproject.toml",
    "environment.txt": "$name/__init__.py",
    "datamodule.txt": "$name/datamodule/$name.yaml",
    "test.txt": "tests/test_$name.py",
}
_NAME = re.compile("[A-Za-z](?:[A-Za-z0-9_]*[A-Za-z0-9])?")
# Our own options, in a checkout and in an installed package.
_OPTIONS = (TEMPLATES.parents[3] / "configs", TEMPLATES.parents[1] / "configs")


def new_environment(name: str, into: Path) -> Path:
    """Write the package ``name`` below ``into``: environment, DataModule, YAML and test.

    Returns its folder, which appears whole or not at all.

    Raises:
        ValueError: The name is none for a package, or is taken.
        FileExistsError: The folder is there already; nothing is overwritten.
        OSError: ``into`` cannot be written to.
    """
    check_name(name)
    folder = into / name
    if os.path.lexists(folder):
        raise FileExistsError(
            f"{folder} is there already, and nothing is overwritten: type another name, or "
            "--into ANOTHER_FOLDER"
        )
    _check_free(name)
    into.mkdir(parents=True, exist_ok=True)
    words = {"name": name, "project": name.replace("_", "-").lower(), "title": _title(name)}
    made = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=into))
    try:
        for template, place in FILES.items():
            text = (TEMPLATES / template).read_text(encoding="utf-8")
            file = made / Template(place).substitute(words)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(Template(text).substitute(words), encoding="utf-8")
        made.chmod(0o755)
        made.rename(folder)
    except OSError as error:
        shutil.rmtree(made, ignore_errors=True)
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise FileExistsError(f"{folder} has just been made by another process") from error
        raise
    return folder


def check_name(name: str) -> None:
    """Refuse what cannot be the name of a package.

    Raises:
        ValueError: Why, and what to type.
    """
    if not _NAME.fullmatch(name) or len(name) > 60:
        better = re.sub("[^a-z0-9]+", "_", name.lower()).strip("_0123456789")[:60].strip("_")
        raise ValueError(
            f"{name!r} cannot be the name of a Python package: letters of a-z, digits and single "
            f"marks _ between them, at most 60 characters, e.g. {better or 'my_game'}"
        )
    if keyword.iskeyword(name) or keyword.issoftkeyword(name):
        raise ValueError(f"{name!r} is a word of Python's: type another name, e.g. {name}_game")


def _check_free(name: str) -> None:
    spec = None
    if name not in sys.stdlib_module_names:
        spec = find_spec(name)
    if name in sys.stdlib_module_names or (spec is not None and spec.origin is not None):
        raise ValueError(
            f"import {name} brings another module already"
            f"{'' if spec is None else f', {spec.origin}'}: type another name, e.g. my_{name}"
        )
    if any((configs / "datamodule" / f"{name}.yaml").exists() for configs in _OPTIONS):
        raise ValueError(
            f"datamodule={name} is an option of this project already: type another name, e.g. "
            f"my_{name}"
        )


def _title(name: str) -> str:
    """The name in the manner of classes."""
    return "".join(part[:1].upper() + part[1:] for part in name.split("_"))
