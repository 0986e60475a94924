"""Curves of finished runs, read from their TensorBoard files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from aem_lightning.analysis.statistics import Estimate, t_interval

Curve = tuple[list[int], list[float]]


def read_curves(run: Path, tags: tuple[str, ...]) -> dict[str, Curve]:
    """The scalar curves of a run by tag; x is the iteration. A tag that it lacks has no points."""
    points: dict[str, dict[int, float]] = {tag: {} for tag in tags}
    for file in sorted((run / "tensorboard").glob("events.out.tfevents.*")):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        for tag in set(tags) & set(events.Tags()["scalars"]):
            points[tag] |= {event.step: event.value for event in events.Scalars(tag)}
    return {
        tag: (sorted(found), [found[x] for x in sorted(found)]) for tag, found in points.items()
    }


def smooth(values: list[float], window: int = 5) -> list[float]:
    """A running mean over the last ``window`` values."""
    parts = (values[max(0, end - window) : end] for end in range(1, len(values) + 1))
    return [sum(part) / len(part) for part in parts]


def mean_curve(curves: Sequence[Curve]) -> tuple[list[int], list[Estimate]]:
    """The mean over runs at each x that all of them have, with Student's interval."""
    found = [dict(zip(*curve, strict=True)) for curve in curves]
    shared = sorted(set.intersection(*map(set, found))) if found else []
    return shared, [t_interval([curve[x] for curve in found]) for x in shared]
