"""The command ``python -m aem_lightning.viewer <transcripts.jsonl or a run's folder>``."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from aem_lightning.card import run_card
from aem_lightning.viewer import Wish, chosen, episode_view, list_view, page, read_episodes
from aem_lightning.viewer.episodes import OUTCOMES
from aem_lightning.viewer.serve import server
from aem_lightning.viewer.terminal import card_view, group_view, groups_view


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    command = argparse.ArgumentParser(
        prog=None if Path(sys.argv[0]).name == "aem-view" else "python -m aem_lightning.viewer",
        description="Show the episodes that a run wrote down: a list, one of them, or a page.",
    )
    command.add_argument("path", type=Path, help="transcripts.jsonl, or a folder that holds it")
    command.add_argument("--episode", type=int, help="show this one, by its number in the list")
    command.add_argument("--prompts", action="store_true", help="with what the model read")
    command.add_argument(
        "--group",
        action="store_true",
        help="copies of one task side by side: of each group a line, or those of --episode",
    )
    command.add_argument("--outcome", choices=OUTCOMES, help="only episodes that ended so")
    command.add_argument("--type", help="only tasks whose type has this in it")
    command.add_argument("--stage", help="only train, validate, test or evaluate")
    command.add_argument("--iteration", type=int, help="only episodes of this iteration")
    shown_as = command.add_mutually_exclusive_group()
    shown_as.add_argument("--html", type=Path, help="write them to this file, as a page")
    shown_as.add_argument(
        "--serve", action="store_true", help="a page that follows a live run, until Ctrl-C"
    )
    command.add_argument("--port", type=int, default=8321, help="of --serve; 0: one that is free")
    return command


def main(arguments: Sequence[str] | None = None) -> None:
    """Show what the command line asks for."""
    given = parser().parse_args(arguments)
    wish = Wish(given.outcome, given.type, given.stage, given.iteration)
    try:
        if given.serve:
            if given.episode is not None or given.group or given.prompts:
                raise ValueError("--serve: --episode, --group and --prompts are chosen in the page")
            _serve(given.path, given.port, wish)
        else:
            _show(given, wish)
    except BrokenPipeError:  # of a pager or head that has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError) as error:
        sys.exit(str(error))


def _show(given: argparse.Namespace, wish: Wish) -> None:
    records, console = read_episodes(given.path), Console()
    number = given.episode
    every = dict(enumerate(records, 1))
    if number is not None and number not in every:
        raise ValueError(f"--episode {number}: allowed is 1 to {len(records)}")
    episodes = chosen(records, wish) if number is None else {number: every[number]}
    card = run_card(given.path if given.path.is_dir() else given.path.parent)
    if given.html is not None:
        given.html.write_text(page(episodes, str(given.path), card), encoding="utf-8")
        console.print(f"written: {given.html.absolute()}", soft_wrap=True, highlight=False)
    elif number is not None:
        unfolded = given.prompts
        view = episode_view(number, every[number], unfolded=unfolded)
        console.print(group_view(number, every) if given.group else view)
    elif given.group:
        console.print(groups_view(episodes))
    else:
        if card.lines():
            console.print(card_view(card))
        console.print(list_view(episodes))


def _serve(path: Path, port: int, wish: Wish) -> None:
    with contextlib.suppress(KeyboardInterrupt), server(path, port, wish) as serving:
        host, taken = serving.server_address[:2]
        Console().print(f"http://{host!s}:{taken}  (Ctrl-C ends it)", highlight=False)
        serving.serve_forever()


if __name__ == "__main__":
    main()
