"""The comparison for people: the paper's Table 1 in markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# The order and the names of the paper's columns.
COLUMNS = {
    "pick_and_place_simple": "Pick",
    "look_at_obj_in_light": "Look",
    "pick_clean_then_place_in_recep": "Clean",
    "pick_heat_then_place_in_recep": "Heat",
    "pick_cool_then_place_in_recep": "Cool",
    "pick_two_obj_and_place": "Pick2",
}
ALL = "all"
# Summaries of a run's curves: which curve, which part of it, and in words.
MEASURES = {
    "train_success": ("train/success_rate", "all", "success in training, all iterations (%)"),
    "val_success": ("val/success_rate", "all", "success in validation, all iterations (%)"),
    "entropy_early": ("aem/entropy", "first third", "entropy, first third (nats)"),
    "entropy_late": ("aem/entropy", "last third", "entropy, last third (nats)"),
    "seconds": ("time/total", "all", "wall time of an iteration (s)"),
}
# What is said of an arm's modulation, and the factor it is shown with.
_EFFECTS = {
    "rollout/mixed_groups": ("groups of mixed returns (%)", 100),
    "aem/gated_groups": ("groups whose α is 1 (%)", 100),
    "aem/alpha_min": ("least α of an iteration", 1),
    "aem/alpha_max": ("greatest α of an iteration", 1),
    "positive_share_base": ("share of positive advantages in Σ\\|A\\|, before (%)", 100),
    "positive_share_modulated": ("and after modulation (%)", 100),
}


def comparison_markdown(content: Mapping[str, Any]) -> str:
    """Final success by task type and arm, then the paired differences with their tests.

    Success in training stands in its place where no arm has played the evaluation games.
    """
    kinds = ordered({kind for arm in content["arms"].values() for kind in arm["success"]})
    names = [COLUMNS.get(kind, kind) for kind in kinds]
    when = "after training"
    if not kinds:
        kinds, names, when = ["train_success"], [ALL], "in training, all iterations"

    def cells_of(found: Mapping[str, Any], *, sign: bool = False) -> list[str]:
        known = {**found["success"], "train_success": found.get("train_success")}
        return [_cell(known.get(kind), 100, sign=sign) for kind in kinds]

    lines = [
        f"Success {when} (%), mean over seeds with Student's 95 % interval.",
        "",
        f"| arm | seeds | {' | '.join(names)} |",
        f"|---|---:|{'---:|' * len(names)}",
    ]
    for arm, found in content["arms"].items():
        seeds = sum(run["arm"] == arm for run in content["runs"])
        lines.append(f"| {arm} | {seeds} | {' | '.join(cells_of(found))} |")
    for pair in content["pairs"]:
        cells = " | ".join(cells_of(pair, sign=True))
        lines.append(f"| *{pair['arm']} − {pair['base']}* | {len(pair['seeds'])} | {cells} |")
    return "\n".join([*lines, *_tests(content["pairs"]), *_effects(content["arms"])])


def _effects(arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = ["", "Over all iterations and seeds:", ""]
    lines += [f"| | {' | '.join(arms)} |", f"|---|{'---:|' * len(arms)}"]
    for name, (label, scale) in _EFFECTS.items():
        found = [arm["effects"][name] for arm in arms.values()]
        cells = ["–" if value is None else f"{value * scale:.3g}" for value in found]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def _tests(pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    lines: list[str] = []
    for pair in pairs:
        seeds = len(pair["seeds"])
        lines += ["", f"**{pair['arm']} − {pair['base']}**, paired over {seeds} seeds", ""]
        if not seeds:
            lines.append("No seed that both arms have.")
            continue
        lines += ["| | difference | p (sign flips over seeds) |", "|---|---:|---:|"]
        rows = [("success after training (%)", pair["success"].get(ALL), 100)]
        rows += [
            (label, pair[name], 100 if name.endswith("success") else 1)
            for name, (*_, label) in MEASURES.items()
        ]
        for label, found, scale in rows:
            p = None if found is None else found["p_sign_flip"]
            said = "–" if p is None else f"{p:.3g}"
            lines.append(f"| {label} | {_cell(found, scale, sign=True)} | {said} |")
        lines += ["", f"The least p that {seeds} pairs can have is {min(1.0, 2 / 2**seeds):.3g}."]
        if games := pair["mcnemar"]:
            lines.append(
                f"Of {games['games']} games over all seeds, {games['gained']} were won by "
                f"{pair['arm']} alone and {games['lost']} by {pair['base']} alone: exact McNemar "
                f"p = {games['p']:.3g}. It compares these policies; about other seeds it says "
                "nothing."
            )
    return lines


def ordered(kinds: set[str]) -> list[str]:
    """Task types in the paper's order, others after them, ``all`` last."""
    return sorted(kinds, key=[*COLUMNS, *sorted(kinds - {ALL}), ALL].index)


def _cell(found: Mapping[str, Any] | None, scale: float, sign: bool = False) -> str:
    if found is None or found["value"] is None:
        return "–"
    digits = 1 if scale == 100 else 3
    shape = f"{'+' if sign else ''}.{digits}f"
    text = format(scale * found["value"], shape)
    if found["low"] is None:
        return text
    return f"{text} [{scale * found['low']:{shape}}, {scale * found['high']:{shape}}]"
