"""Anchor states: which responses of a group are given in the same place, as far as it shows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import get_args

import torch
from torch import Tensor

from aem_lightning.types import AnchorBy, Trajectory, Turn


def anchor_states(
    trajectories: Sequence[Trajectory],
    similarity: float = 1.0,
    by: AnchorBy = "observation",
) -> Tensor:
    """An id for each response, equal where group and observation are, or what ``by`` names.

    GiGPO's grouping by anchor state (arXiv 2505.10978). With ``similarity`` under 1, such a text
    joins the first earlier one of its group that it is that much alike, by the ratio of difflib's
    ``SequenceMatcher``: 2 * matching characters / all characters.

    Args:
        trajectories: The episodes.
        similarity: The least ratio; in (0, 1], 1 is equality.
        by: What tells one state from another. An ``observation`` may hide it: an empty shelf looks
            the same to who holds the mug and to who does not. The ``admissible_actions`` differ
            there; where an environment names none, the observation decides.

    Returns:
        [R], 0..K-1 in the order of first appearance.

    Raises:
        ValueError: A similarity out of range, or an unknown ``by``.
    """
    if by not in get_args(AnchorBy):
        raise ValueError(f"anchor_by={by!r} is unknown; allowed: {', '.join(get_args(AnchorBy))}.")
    if not 0 < similarity <= 1:
        raise ValueError(
            f"anchor_similarity={similarity} is not allowed: type a share in (0, 1], e.g. 0.9"
        )
    keys = [(tr.group, _text_of(turn, by)) for tr in trajectories for turn in tr.turns]
    ids: dict[tuple[int, str], int] = {}
    count = 0
    openers: dict[int, list[str]] = defaultdict(list)  # the first text of each anchor, by group
    for group, text in dict.fromkeys(keys):
        known = openers[group]
        alike = _first_alike(text, known, similarity) if similarity < 1 else None
        if alike is None:
            known.append(text)
            ids[group, text], count = count, count + 1
        else:
            ids[group, text] = ids[group, alike]
    return torch.tensor([ids[key] for key in keys], dtype=torch.long)


def hidden_states(trajectories: Sequence[Trajectory]) -> tuple[int, int]:
    """How many responses answer an observation that hides the state, of how many.

    It does where it was met in the same group with other admissible actions. Responses count whose
    environment names such actions.
    """
    turns = [(t.group, turn) for t in trajectories for turn in t.turns if turn.admissible_actions]
    states: dict[tuple[int, str], set[frozenset[str]]] = defaultdict(set)
    for group, turn in turns:
        states[group, turn.observation].add(frozenset(turn.admissible_actions))
    return sum(len(states[group, turn.observation]) > 1 for group, turn in turns), len(turns)


def _text_of(turn: Turn, by: AnchorBy) -> str:
    told = "\n".join(sorted(turn.admissible_actions)) if by == "admissible_actions" else ""
    return told or turn.observation


def _first_alike(text: str, known: Sequence[str], similarity: float) -> str | None:
    matcher = SequenceMatcher(b=text, autojunk=False)
    for other in known:
        matcher.set_seq1(other)
        # The first two are cheap upper bounds of the third.
        bounds = (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio)
        if all(bound() >= similarity for bound in bounds):
            return other
    return None
