"""The command ``python -m aem_lightning.viewer <transcripts.jsonl or a run's folder>``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from aem_lightning.viewer import Wish, chosen, episode_view, list_view, page, read_episodes
from aem_lightning.viewer.episodes import OUTCOMES


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    command = argparse.ArgumentParser(
        prog=None if Path(sys.argv[0]).name == "aem-view" else "python -m aem_lightning.viewer",
        description="Show the episodes that a run wrote down: a list, one of them, or a page.",
    )
    command.add_argument("path", type=Path, help="transcripts.jsonl, or a folder that holds it")
    command.add_argument("--episode", type=int, help="show this one, by its number in the list")
    command.add_argument("--prompts", action="store_true", help="with what the model read")
    command.add_argument("--outcome", choices=OUTCOMES, help="only episodes that ended so")
    command.add_argument("--type", help="only tasks whose type has this in it")
    command.add_argument("--stage", help="only train, validate, test or evaluate")
    command.add_argument("--iteration", type=int, help="only episodes of this iteration")
    command.add_argument("--html", type=Path, help="write them to this file, as a page")
    return command


def main(arguments: Sequence[str] | None = None) -> None:
    """Show what the command line asks for."""
    given = parser().parse_args(arguments)
    console = Console()
    try:
        records = read_episodes(given.path)
        if given.episode is None:
            wish = Wish(given.outcome, given.type, given.stage, given.iteration)
            episodes = chosen(records, wish)
        elif 1 <= given.episode <= len(records):
            episodes = {given.episode: records[given.episode - 1]}
        else:
            raise ValueError(f"--episode {given.episode}: allowed is 1 to {len(records)}")
        if given.html is not None:
            given.html.write_text(page(episodes, str(given.path)), encoding="utf-8")
            console.print(f"written: {given.html.absolute()}", soft_wrap=True, highlight=False)
        elif given.episode is not None:
            view = episode_view(given.episode, episodes[given.episode], unfolded=given.prompts)
            console.print(view)
        else:
            console.print(list_view(episodes))
    except BrokenPipeError:  # of a pager or head that has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
