"""The command ``python -m aem_lightning.gpu_check [key=value ...]``.

device=auto|cuda|cpu   where; a CPU gets small shapes: that proves the command alone
folder=logs/gpu_check  figures, logs, models and runs; what was green there is not run again
only=graphs,head       some of the pieces
keep_going=true        go on after a red piece
limit_s=600            seconds that a piece may take
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from aem_lightning.files import write_atomically
from aem_lightning.gpu_check.piece import Check, Figures, Piece
from aem_lightning.gpu_check.report import engines, table, verdict

OPTIONS = {
    "device": "auto",
    "folder": "logs/gpu_check",
    "only": "",
    "keep_going": "false",
    "limit_s": "600",
    "alone": "",  # a piece that another process of this command has started
}


def main(words: list[str]) -> int:
    """Run the pieces that ``words`` ask for; the exit status."""
    if {"-h", "--help"} & {*words}:
        print(__doc__)
        return 0
    options = parsed(words)
    from aem_lightning.gpu_check.pieces import PIECES  # here: the rest needs no torch

    check = Check(found_device(options["device"]), Path(options["folder"]).absolute(), checkout())
    check.folder.mkdir(parents=True, exist_ok=True)
    pieces = {piece.name: piece for piece in PIECES}
    wanted = options["only"].split(",") if options["only"] else [*pieces]
    if unknown := [name for name in wanted if name not in pieces]:
        sys.exit(f"only={','.join(unknown)}: there is no such piece; allowed: {', '.join(pieces)}")
    if options["alone"]:
        measure(check, pieces[options["alone"]])
        return 0
    os.environ["HF_HUB_OFFLINE"] = "1"
    found: dict[str, Figures] = {}
    for name in wanted:
        found[name] = check.earlier(name) or run(check, pieces[name], float(options["limit_s"]))
        print(json.dumps(found[name]), flush=True)
        if found[name]["red"] and options["keep_going"] != "true":
            break
    write_atomically(check.folder / "table.md", table(found) + "\n")
    parts = [table(found), engines(found), verdict(found, wanted)]
    print("", *filter(None, parts), sep="\n\n")
    return int(any(figures["red"] for figures in found.values()))


def parsed(words: list[str]) -> dict[str, str]:
    """The options with what was typed."""
    typed = dict(word.partition("=")[::2] for word in words)
    if unknown := [name for name in typed if name not in OPTIONS]:
        sys.exit(f"{unknown[0]}: there is no such option; allowed:\n{__doc__}")
    return OPTIONS | typed


def found_device(typed: str) -> str:
    """``cuda`` or ``cpu``."""
    import torch

    if typed not in ("auto", "cuda", "cpu"):
        sys.exit(f"device={typed}: allowed are auto, cuda and cpu")
    if typed == "cuda" and not torch.cuda.is_available():
        sys.exit("device=cuda: torch finds no GPU. Type device=cpu for small shapes")
    return typed if typed != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def checkout() -> Path:
    """The folder with configs, tests and benchmarks: here, or where this package lies."""
    for place in (Path.cwd(), Path(__file__).resolve().parents[3]):
        if (place / "configs" / "experiment").is_dir() and (place / "train.py").is_file():
            return place
    sys.exit("gpu_check runs the checkout's own commands: type it in the project's folder")


def run(check: Check, piece: Piece, limit: float) -> Figures:
    """The figures of a piece, on a GPU in a process of its own: it leaves no memory behind."""
    if check.small:
        return measure(check, piece)
    check.file(piece.name).unlink(missing_ok=True)
    command = [sys.executable, "-m", "aem_lightning.gpu_check", f"alone={piece.name}"]
    command += [f"device={check.device}", f"folder={check.folder}"]
    log = check.folder / f"{piece.name}.log"
    red = f"it left no figures: see {log}"
    with log.open("w", encoding="utf-8") as out:
        try:
            subprocess.run(
                command,
                cwd=check.root,
                env=os.environ | dict(piece.environment),
                stdout=out,
                stderr=out,
                timeout=limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            red = f"it took more than {limit:.0f} s: see {log}"
    if check.file(piece.name).is_file():
        figures: Figures = json.loads(check.file(piece.name).read_text(encoding="utf-8"))
        return figures
    figures = {"piece": piece.name, "device": check.device, "red": red}
    check.keep(piece.name, figures)
    return figures


def measure(check: Check, piece: Piece) -> Figures:
    """Measure a piece here, and keep its figures; whatever it raises makes it red."""
    start = time.perf_counter()
    try:
        figures = piece.measure(check)
    except Exception as error:  # the check goes on to tell of it
        if not check.small:
            import traceback

            traceback.print_exc()  # into the log of the piece
        figures = {"red": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
    figures = {
        "piece": piece.name,
        "device": check.device,
        "about": piece.about,
        "took_s": time.perf_counter() - start,
        **figures,
    }
    check.keep(piece.name, figures)
    return figures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
