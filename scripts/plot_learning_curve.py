"""Draw the learning curve of one or more runs.

python scripts/plot_learning_curve.py logs/quickstart/<time> --out docs/learning_curve.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from aem_lightning.analysis.curves import read_curves, smooth


def draw(runs: list[Path], out: Path) -> None:
    """Success above, entropy below; squares are the evaluations before and after training."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (success, entropy) = plt.subplots(
        2, 1, figsize=(7.5, 7), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    names = {}
    for number, run in enumerate(runs):
        color = f"C{number}"
        curves = read_curves(run, ("train/success_rate", "val/success_rate", "aem/entropy"))
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        names[summary.get("name", run.name)] = None
        xs, ys = curves["train/success_rate"]
        success.plot(xs, smooth(ys), color=color, alpha=0.5, label=f"seed {summary['seed']}")
        xs, ys = curves["val/success_rate"]
        done = [x + 1 for x in xs]  # a validation comes after its iteration's update
        success.plot(done, ys, "o--", color=color, markersize=4, alpha=0.7)
        for x, name in ((0, "success_before"), (summary["iterations"], "success_after")):
            if found := summary[name]:
                rate = found["rate"]
                bars = [[rate - found["low"]], [found["high"] - rate]]
                place = x + 0.4 * (number - (len(runs) - 1) / 2)  # else they hide each other
                success.errorbar(place, rate, yerr=bars, color=color, fmt="s", capsize=4)
        xs, ys = curves["aem/entropy"]
        entropy.plot(xs, smooth(ys), color=color)
    for style, label in (
        ({"alpha": 0.5}, "episodes of training, mean of the last 5 iterations"),
        ({"marker": "o", "linestyle": "--", "alpha": 0.7}, "validation games"),
        ({"marker": "s", "linestyle": ""}, "all evaluation games before training (at 0) and after"),
    ):
        success.plot([], [], color="0.3", label=label, **style)
    bars = "bars: Wilson's 95 % interval over games"
    success.set(ylabel="success rate", ylim=(0, 1), title=f"{', '.join(names)}: success ({bars})")
    success.legend(fontsize=8, loc="lower right")
    entropy.set_title("entropy of a token in training, mean of the last 5 iterations", fontsize=10)
    entropy.set(xlabel="iterations done", ylabel="entropy (nats)")
    figure.savefig(out, dpi=120)


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--out", type=Path, default=Path("learning_curve.png"))
    arguments = parser.parse_args()
    missing = [str(run) for run in arguments.runs if not (run / "summary.json").is_file()]
    if missing:
        sys.exit(f"no summary.json in {', '.join(missing)}: give folders of finished runs")
    try:
        draw(arguments.runs, arguments.out)
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is missing: pip install 'aem-lightning[notebooks]'")


if __name__ == "__main__":
    main()
