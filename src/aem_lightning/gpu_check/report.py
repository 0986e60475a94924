"""What a person reads: the verdict, and the table for docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from aem_lightning.gpu_check.piece import Figures

NEAR = 0.7  # of the memory's rate: what a server's own work leaves of it


def verdict(found: Mapping[str, Figures], wanted: Sequence[str]) -> str:
    """Whether this machine is fit, in a sentence."""
    red = {name: figures["red"] for name, figures in found.items() if figures["red"]}
    missing = [name for name in wanted if name not in found]
    if red:
        said = "; ".join(f"{name}: {reason}" for name, reason in red.items())
        later = f" Not run: {', '.join(missing)}." if missing else ""
        return f"RED. {said}.{later}"
    if missing:
        return f"Green so far; not run: {', '.join(missing)}."
    return f"GREEN: all {len(wanted)} pieces."


def engines(found: Mapping[str, Figures]) -> str:
    """What to expect of each engine, and which to choose; nothing where none was measured."""
    known: Mapping[str, Any] = found.get("graphs", {}).get("engines", {})
    said = [
        f"{case}: engine=hf {each['hf_tokens_per_s']:,.0f} tokens/s measured, engine=vllm at most "
        f"{each['vllm_at_most_tokens_per_s']:,.0f} by arithmetic (memory read once a step)"
        for case, each in known.items()
    ]
    if said:
        worst = min(each["hf_share"] for each in known.values())
        said.append(
            f"engine=hf has {worst:.0%} of what memory allows, or more"
            + (": engine=vllm gains little" if worst >= NEAR else ": try engine=vllm too")
            + ". A server needs memory or a GPU of its own, and gives no entropies."
        )
    return "\n".join(said)


def table(found: Mapping[str, Figures]) -> str:
    """Every figure of every piece, a row each, in Markdown."""
    rows = ["| piece | figure | value |", "|---|---|---|"]
    for name, figures in found.items():
        for figure, value in _flat(figures):
            if figure not in ("piece", "device"):
                rows.append(f"| {name} | {figure} | {_shown(value)} |")
    return "\n".join(rows)


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested figures, by their names one after the other."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _flat(part, f"{path}, {name}" if path else str(name))
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        for number, part in enumerate(value):
            yield from _flat(part, f"{path} {number}")
    else:
        yield path, value


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return "–" if value is None else str(value).replace("|", "/")
