"""The command ``aem new env NAME``, or ``python -m aem_lightning.new env NAME``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from aem_lightning.new import FILES, new_environment
from aem_lightning.runner.shipped import as_typed

NEXT = """\
{folder} is a package with an environment that works already:
{files}
Install it, prove its contract, and train on it:
  pip install -e {folder}
  python train.py datamodule={name} prompt=plain stage=check
  python train.py experiment=quickstart datamodule={name}
Then put your own words in the place of the example's."""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    command = argparse.ArgumentParser(prog="aem", description="Tools of aem_lightning.")
    new = command.add_subparsers(required=True, metavar="new").add_parser(
        "new", help="write the start of a package of your own"
    )
    env = new.add_subparsers(required=True, metavar="env").add_parser(
        "env", help="an environment, its DataModule, a test and a YAML file"
    )
    env.add_argument("name", metavar="NAME", help="what it is called: my_game")
    env.add_argument(
        "--into", type=Path, default=Path(), metavar="FOLDER", help="where; the current folder"
    )
    return command


def main(arguments: Sequence[str] | None = None) -> None:
    """Write what the command line asks for."""
    given = parser().parse_args(arguments)
    try:
        folder = new_environment(given.name, given.into)
    except (ValueError, OSError) as error:
        sys.exit(f"aem new env: {error}")
    files = "\n".join(f"  {place.replace('$name', given.name)}" for place in FILES.values())
    print(as_typed(NEXT).format(folder=folder, files=files, name=given.name))


if __name__ == "__main__":
    main(["new", *sys.argv[1:]])
