"""The files that an environment's official data lies in, and what to type where they are missing.

Imports nothing: a run asks before it loads anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def alfworld_folder(root: str | Path, split: str) -> Path:
    """The folder of the games of ``split``.

    Raises:
        FileNotFoundError: It is missing.
    """
    folder = Path(root) / "json_2.1.1" / split
    if not os.path.isdir(folder):  # no error where a name is longer than names can be
        raise FileNotFoundError(
            f"No ALFWorld games: {folder} is not a folder. To fetch the official games, type "
            f"ALFWORLD_DATA={root} alfworld-download; to play generated ones, add the override "
            "datamodule=alfworld_generated"
        )
    return folder


def webshop_paths(
    root: Path, *, goals: str, products: str, attributes: str, human: str
) -> dict[str, Path]:
    """WebShop's files below ``root``; that of human instructions is for human goals alone."""
    names = {"products": products, "attributes": attributes}
    if goals == "human":
        names["human"] = human
    return {kind: root / name for kind, name in names.items()}


def check_webshop_files(paths: Iterable[Path]) -> None:
    """Raise unless WebShop's official files ``paths`` are there.

    Raises:
        FileNotFoundError: One is missing.
    """
    missing = [str(path) for path in paths if not os.path.isfile(path)]
    if missing:
        raise FileNotFoundError(
            f"No WebShop data: {', '.join(missing)} missing. Fetch the files as the WebShop "
            "repository says (setup.sh -d all; its file names with _1000 are the small ones) "
            "and name their folder: WEBSHOP_DATA=/data/webshop, or datamodule.root=...; to "
            "play a generated catalogue, add the override datamodule=webshop_generated"
        )


def swe_file(path: str, split: str) -> Path:
    """The file of the instances of ``split``.

    Raises:
        FileNotFoundError: It is missing.
    """
    file = Path(path).expanduser()
    if not os.path.isfile(file):
        raise FileNotFoundError(
            f"No SWE instances: {file} is not a file. Give datamodule.splits.{split}=<file>, read "
            "from the hub with datamodule=swe_hub, or play embedded ones: datamodule=swe_embedded"
        )
    return file
