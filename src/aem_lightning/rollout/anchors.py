"""Anchor states: which responses of a group answer the same observation."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

import torch
from torch import Tensor

from aem_lightning.types import Trajectory


def anchor_states(trajectories: Sequence[Trajectory], similarity: float = 1.0) -> Tensor:
    """An id for each response, equal where group and observation are.

    GiGPO's grouping by anchor state (arXiv 2505.10978). With ``similarity`` under 1, an observation
    joins the first earlier one of its group that it is that much alike, by the ratio of difflib's
    ``SequenceMatcher``: 2 * matching characters / all characters.

    Args:
        trajectories: The episodes.
        similarity: The least ratio; in (0, 1], 1 is equality.

    Returns:
        [R], 0..K-1 in the order of first appearance.

    Raises:
        ValueError: A similarity out of range.
    """
    if not 0 < similarity <= 1:
        raise ValueError(
            f"anchor_similarity={similarity} is not allowed: type a share in (0, 1], e.g. 0.9"
        )
    ids: dict[tuple[int, str], int] = {}
    count = 0
    openers: dict[int, list[str]] = {}  # the first observation of each anchor, by group
    for trajectory in trajectories:
        known = openers.setdefault(trajectory.group, [])
        for turn in trajectory.turns:
            key = (trajectory.group, turn.observation)
            if key in ids:
                continue
            alike = _first_alike(turn.observation, known, similarity) if similarity < 1 else None
            if alike is None:
                known.append(turn.observation)
                ids[key], count = count, count + 1
            else:
                ids[key] = ids[trajectory.group, alike]
    return torch.tensor(
        [ids[tr.group, turn.observation] for tr in trajectories for turn in tr.turns],
        dtype=torch.long,
    )


def _first_alike(text: str, known: Sequence[str], similarity: float) -> str | None:
    matcher = SequenceMatcher(b=text, autojunk=False)
    for other in known:
        matcher.set_seq1(other)
        # The first two are cheap upper bounds of the third.
        bounds = (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio)
        if all(bound() >= similarity for bound in bounds):
            return other
    return None
