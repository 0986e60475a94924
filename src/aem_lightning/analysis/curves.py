"""Curves of finished runs, read from their TensorBoard files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from aem_lightning.analysis.statistics import Estimate, t_interval

Curve = tuple[list[int], list[float]]


def read_curves(run: Path, tags: tuple[str, ...]) -> dict[str, Curve]:
    """The scalar curves of a run by tag; x is the iteration. A tag that it lacks has no points."""
    files = sorted((run / "tensorboard").glob("events.out.tfevents.*"))
    points = {tag: dict[int, float]() for tag in tags} | read_points(files, tags)
    return {
        tag: (sorted(found), [found[x] for x in sorted(found)]) for tag, found in points.items()
    }


def read_points(
    sources: Iterable[Path], tags: Iterable[str] | None = None
) -> dict[str, dict[int, float]]:
    """The scalars of TensorBoard's files or folders, by tag and step; a later source's hold.

    Args:
        sources: Files, each as it is; of a folder what its later files did not take back.
        tags: Those that are wanted; ``None``: all.
    """
    points: dict[str, dict[int, float]] = {}
    for source in sources:
        events = EventAccumulator(str(source), size_guidance={"scalars": 0})
        events.Reload()
        there = events.Tags()["scalars"]
        for tag in there if tags is None else set(tags) & set(there):
            found = {event.step: event.value for event in events.Scalars(tag)}
            points.setdefault(tag, {}).update(found)
    return points


def smooth(values: list[float], window: int = 5) -> list[float]:
    """A running mean over the last ``window`` values."""
    parts = (values[max(0, end - window) : end] for end in range(1, len(values) + 1))
    return [sum(part) / len(part) for part in parts]


def mean_curve(curves: Sequence[Curve]) -> tuple[list[int], list[Estimate]]:
    """The mean over runs at each x that all of them have, with Student's interval."""
    found = [dict(zip(*curve, strict=True)) for curve in curves]
    shared = sorted(set.intersection(*map(set, found))) if found else []
    return shared, [t_interval([curve[x] for curve in found]) for x in shared]
