"""The command ``python -m aem_lightning.hub push RUN --repo owner/name``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from aem_lightning.hub import push, stage


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    command = argparse.ArgumentParser(
        prog="python -m aem_lightning.hub",
        description="Push a run's adapter to the Hugging Face hub, with a model card.",
    )
    command.add_argument("verb", choices=["push"])
    command.add_argument("run", type=Path, help="the folder of a run that came to its end")
    command.add_argument("--repo", required=True, help="owner/name; made where it is not there")
    command.add_argument("--private", action="store_true", help="where it is made")
    command.add_argument("--with-base", action="store_true", help="a base that is a folder, too")
    command.add_argument("--base", help="the name that such a base has on the hub already")
    command.add_argument("--license", help="of the adapter, e.g. mit")
    command.add_argument("--dry-run", action="store_true", help="lay it out in RUN/hub; no more")
    return command


def main(arguments: Sequence[str] | None = None) -> None:
    """Push what the command line asks for."""
    given = parser().parse_args(arguments)
    try:
        staged = stage(
            given.run,
            given.repo,
            with_base=given.with_base,
            base=given.base,
            license_=given.license,
        )
        print("\n".join(staged.files))
        if not given.dry_run:
            print("\n".join(push(staged, private=given.private)))
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
