"""The command ``python -m aem_lightning.runner.serve datamodule=...``: an OpenEnv server."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from aem_lightning.envs.base import import_extra
from aem_lightning.envs.openenv_server import application
from aem_lightning.runner.shipped import shipped


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    command = argparse.ArgumentParser(
        prog="python -m aem_lightning.runner.serve",
        description="Serve the environment of a training's config to OpenEnv clients, the tasks of "
        "a split by their number as the seed.",
    )
    command.add_argument("overrides", nargs="*", help="as for train.py: datamodule=...")
    command.add_argument("--split", default="train")
    command.add_argument("--host", default="127.0.0.1")
    command.add_argument("--port", type=int, default=8000)
    return command


def served(overrides: Sequence[str], split: str) -> Any:
    """The application that serves the tasks of ``split``; games are made where there are none."""
    from aem_lightning.runner.parts import made

    with initialize_config_dir(str(shipped("configs")), version_base="1.3"):
        cfg = compose("train", list(overrides))
    datamodule: Any = made("datamodule", cfg.datamodule)
    datamodule.prepare_data()
    tasks = [task.id for task in datamodule.tasks(split)]
    return application(datamodule.env_factory(), tasks)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve what the command line asks for."""
    given = parser().parse_args(arguments)
    try:
        uvicorn = import_extra("uvicorn", "adapters")
        app = served(given.overrides, given.split)
    except (ImportError, OSError, ValueError, HydraException) as error:
        sys.exit(str(error))
    uvicorn.run(app, host=given.host, port=given.port)


if __name__ == "__main__":
    main()
