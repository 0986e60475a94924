"""The command ``python -m aem_lightning.export RUN --form sft --out FOLDER``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from aem_lightning.export import FORMS, chat_reader, rows_of
from aem_lightning.export.curves import read_curves, write_curves
from aem_lightning.viewer.episodes import OUTCOMES, Wish, chosen, read_episodes

CURVES = "rl-doctor"


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    forms = "\n".join(f"  {name}: {told}" for name, told in FORMS.items())
    command = argparse.ArgumentParser(
        prog="python -m aem_lightning.export",
        description="Write a run's episodes for other libraries. Forms:\n"
        f"{forms}\n  {CURVES}: an iteration a line, curves under TRL's names: rl-doctor diagnose "
        "FILE",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("run", type=Path, help="a run's folder, or a transcripts.jsonl")
    command.add_argument("--form", choices=[*FORMS, CURVES], required=True)
    command.add_argument("--out", type=Path, required=True, help="a folder (rl-doctor: a file)")
    command.add_argument("--outcome", choices=OUTCOMES, help="only episodes that ended so")
    command.add_argument("--min-return", type=float, help="only episodes that earned as much")
    command.add_argument("--type", help="only tasks whose type has this in it")
    command.add_argument("--stage", help="only train, validate, test or evaluate")
    command.add_argument("--iteration", type=int, help="only episodes of this iteration")
    command.add_argument("--tokenizer", help="of the model that was played; default: RUN/adapter")
    return command


def main(arguments: Sequence[str] | None = None) -> None:
    """Write what the command line asks for."""
    given = parser().parse_args(arguments)
    try:
        if given.out.exists() and (given.out.is_file() or any(given.out.iterdir())):
            raise ValueError(f"--out {given.out}: it is there already. Give another name")
        if given.form == CURVES:
            told = write_curves(read_curves(given.run), given.out)
        else:
            told = _write_rows(given)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    print(told)


def _write_rows(given: argparse.Namespace) -> str:
    import datasets

    wish = Wish(given.outcome, given.type, given.stage, given.iteration)
    records = [*chosen(read_episodes(given.run), wish).values()]
    least = given.min_return
    if least is not None:
        earned = [record["returns"] for record in records if record["returns"] is not None]
        records = [r for r in records if r["returns"] is not None and r["returns"] >= least]
        if not records:
            best = max(earned, default=None)
            raise ValueError(f"--min-return {least}: the best of {len(earned)} earned {best}")
    folder = given.run if given.run.is_dir() else given.run.parent
    chats = chat_reader(folder, given.tokenizer)
    rows = rows_of(given.form, records, chats)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    if given.form == "verifiers":
        given.out.mkdir(exist_ok=True)
        datasets.Dataset.from_list(rows).to_json(str(given.out / "results.jsonl"))
    else:
        datasets.disable_progress_bars()
        datasets.Dataset.from_list(rows).save_to_disk(str(given.out))
    told = f"{len(rows)} rows of {len(records)} episodes: {given.out}"
    if chats.lost:
        told += f"\n{chats.lost} responses are left out: their prompts were not kept"
    if chats.changed:
        told += (
            f"\n{chats.changed} prompts would come out otherwise by the chat template, which drops "
            "earlier thoughts or blanks; what is written is what was read"
        )
    return told


if __name__ == "__main__":
    main()
