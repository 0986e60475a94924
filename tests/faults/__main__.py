"""``make faults``: every kind of fault, several times, as a table; what is done is not done again.

``ARGS="--tries 1 --only signal"`` tries some; ``--soak 300`` adds one long run with a fault in each
tenth iteration.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import linear_regression
from typing import Any

from runs import ROOT

from faults.forks import Try
from faults.kinds import SOAK, Kind, kinds

GOOD = ("bit-equal", "went on", "named error")


def tried(kind: Kind, number: int, folder: Path) -> dict[str, Any]:
    """One try of a kind, in a folder that is gone afterwards."""
    mine = folder / f"{re.sub(r'[^a-z0-9]+', '_', kind.name.lower())}_{number}"
    shutil.rmtree(mine, ignore_errors=True)
    mine.mkdir(parents=True)
    start = time.monotonic()
    seen, lost = kind.run(Try(mine, number, folder / "shared"))
    shutil.rmtree(mine, ignore_errors=True)
    return {
        "area": kind.area,
        "kind": kind.name,
        "number": number,
        "seen": seen,
        "lost": lost[-300:],
        "as_it_must": seen in kind.must,
        "seconds": round(time.monotonic() - start, 1),
    }


def soak(iterations: int, folder: Path) -> dict[str, Any]:
    """Slopes of memory and descriptors over a run in which each tenth iteration meets a fault."""
    this = Try(folder / "soak", 0, folder / "shared")
    shutil.rmtree(this.folder, ignore_errors=True)
    this.folder.mkdir(parents=True)
    epochs = f"iterations_per_epoch={iterations // 5}"
    places = f"+callbacks.soak.series={this.folder}/series.jsonl"
    limit_s = 60.0 + 5 * iterations
    ended = this.train(*SOAK, places, f"iterations={iterations}", epochs, limit_s=limit_s)
    lines = (this.folder / "series.jsonl").read_text().splitlines()[iterations // 10 :]  # once warm
    columns = {name: [json.loads(line)[name] for line in lines] for name in json.loads(lines[0])}
    x = columns.pop("iteration")
    slopes = {name: linear_regression(x, values).slope for name, values in columns.items()}
    return {"iterations": iterations, "seen": ended.how, "slopes": slopes}


def table(rows: list[dict[str, Any]], long_run: dict[str, Any] | None) -> str:
    """The document: a line for each kind."""
    bad = sum(not row["as_it_must"] for row in rows)
    lines = [
        "# Faults",
        "",
        f"Written by `make faults`: {len(rows)} tries of {len({r['kind'] for r in rows})} kinds on"
        f" the toy environment of the tests; {bad} did not end as they must. *bit-equal*: the run"
        " ended, after a resume where it was ended, with the weights, optimizer states and"
        " iterations of an undisturbed one. *named error*: it ended with one message and no"
        " traceback.",
        "",
        "| area | fault | tries | what happened | what was lost |",
        "|---|---|---:|---|---|",
    ]
    for area, kind in dict.fromkeys((row["area"], row["kind"]) for row in rows):
        mine = [row for row in rows if row["kind"] == kind]
        seen = Counter(row["seen"] if row["as_it_must"] else f"**{row['seen']}**" for row in mine)
        lost = Counter(row["lost"] for row in mine if row["seen"] in GOOD) or {"see above": 0}
        longest = max(lost, key=len).replace(f"{ROOT}/", "")[:120]
        cells = [", ".join(f"{n} × {word}" for word, n in seen.items()), longest]
        lines.append(f"| {area} | {kind} | {len(mine)} | {' | '.join(cells)} |")
    if long_run:
        slopes = ", ".join(f"{value:+.4f} {name}" for name, value in long_run["slopes"].items())
        lines += [
            "",
            f"A run of {long_run['iterations']} iterations with a fault in each tenth "
            f"{long_run['seen']}; each further iteration added {slopes}.",
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """The exit status says whether all ended as they must."""
    parser = argparse.ArgumentParser(prog="make faults", description=__doc__)
    parser.add_argument("--tries", type=int, default=5)
    parser.add_argument("--only", default="", help="kinds or areas that contain this")
    parser.add_argument("--soak", type=int, default=300, help="iterations; 0 for none")
    parser.add_argument("--folder", type=Path, default=ROOT / "logs" / "faults")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "faults.md")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    kept = given.folder / "tries.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    done = {(row["kind"], row["number"]) for row in rows}
    chosen = [kind for kind in kinds() if given.only in f"{kind.area} {kind.name}"]
    todo = [(k, n) for n in range(given.tries) for k in chosen if (k.name, n) not in done]
    random.Random(0).shuffle(todo)
    for i, (kind, number) in enumerate(todo, 1):
        rows.append(tried(kind, number, given.folder))
        with kept.open("a") as lines:
            lines.write(json.dumps(rows[-1]) + "\n")
        said = "" if rows[-1]["as_it_must"] else f"  <-- must be {' or '.join(kind.must)}: "
        said += "" if rows[-1]["as_it_must"] else rows[-1]["lost"]
        print(f"{i}/{len(todo)} {kind.area}: {kind.name}: {rows[-1]['seen']}{said}", flush=True)
    long_run = soak(given.soak, given.folder) if given.soak else None
    rows.sort(key=lambda row: (row["area"], row["kind"], row["number"]))
    given.out.write_text(table(rows, long_run), encoding="utf-8")
    written = {"tries": rows, "soak": long_run}
    (given.folder / "faults.json").write_text(json.dumps(written, indent=1), encoding="utf-8")
    return int(not all(row["as_it_must"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
