"""Write the table of licences of what ``pyproject.toml`` names: ``licences.py docs/licences.md``.

Each package says its own in its metadata, or else in the first line of its licence file. One that
is not installed here (the extras that ``all`` leaves out) keeps the row that it has.
"""

from __future__ import annotations

import contextlib
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
LOCK = PROJECT.with_name("requirements.lock")
HEAD = """# Licences of what this project depends on

aem_lightning itself is under the MIT licence. It contains no code of the packages below: pip
installs them beside it. Each row is what that package's metadata says, at the version of
`constraints.txt`. `make licences` writes this file. What those packages need in their turn stands
in `requirements.lock`.

Not from PyPI, and installed by the system: bubblewrap (LGPL-2.0-or-later) and libseccomp (LGPL-2.1)
for `swe`. Games, shops and models that a user fetches have licences of their own.

| package | licence | comes with |
|---|---|---|
"""
STRICT = """
## Under a GNU licence

Among all that `requirements.lock` names. Whoever passes them on, in an image for instance, passes
on their source too.

"""
OF_NO_NAME = ("DFSG approved", "OSI Approved")


def named(project: dict) -> dict[str, list[str]]:
    """Each direct dependency with the extras that bring it; ``every install`` for the others."""
    found: dict[str, list[str]] = {}
    for extra, wants in {"": project["dependencies"], **project["optional-dependencies"]}.items():
        for want in wants:
            name = re.match(r"[A-Za-z0-9._-]+", want)[0]
            if name != project["name"]:
                found.setdefault(name, []).append(f"`{extra}`" if extra else "every install")
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def licence(package: Distribution) -> str:
    """What the metadata of ``package`` says, in a few words."""
    told = package.metadata
    if expression := told.get("License-Expression"):
        return expression
    classes = [c.split(" :: ")[-1] for c in told.get_all("Classifier") or [] if "License ::" in c]
    if classes := [c for c in classes if c not in OF_NO_NAME]:
        return ", ".join(classes)
    if text := (told.get("License") or "").strip():
        return text.splitlines()[0].strip(" #")
    files = [file for file in package.files or [] if "licen" in file.name.lower()]
    lines = [line.strip(" #") for file in files[:1] for line in file.read_text().splitlines()]
    return next(line for line in lines if "licen" in line.lower())


def table(project: dict, earlier: str) -> str:
    """The file, with the rows of ``earlier`` for what is not installed."""
    rows = dict(re.findall(r"^\| (\S+) \| (.+) \| .+ \|$", earlier, re.MULTILINE))
    lines = []
    for name, extras in named(project).items():
        try:
            said = licence(distribution(name))
        except PackageNotFoundError:
            if name not in rows:
                sys.exit(f"{name} is not installed, and has no row yet: make test-adapters")
            said = rows[name]
        lines.append(f"| {name} | {said} | {', '.join(extras)} |\n")
    strict = [f"- {name}: {said}\n" for name, said in locked() if re.search(r"GPL|GENERAL", said)]
    return f"{HEAD}{''.join(lines)}{STRICT}{''.join(strict)}"


def locked() -> Iterator[tuple[str, str]]:
    """Every package of the lock file that is installed here, with its licence."""
    for name in re.findall(r"^([A-Za-z0-9._-]+)==", LOCK.read_text(encoding="utf-8"), re.MULTILINE):
        with contextlib.suppress(PackageNotFoundError):
            yield name, licence(distribution(name))


if __name__ == "__main__":
    file = Path(sys.argv[1])
    earlier = file.read_text(encoding="utf-8") if file.is_file() else ""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    file.write_text(table(project, earlier), encoding="utf-8")
