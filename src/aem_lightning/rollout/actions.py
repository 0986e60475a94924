"""Where in a response its action is, in tokens."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aem_lightning.types import RolloutBatch, Trajectory, Turn

Decode = Callable[[Sequence[int]], str]


def action_mask(batch: RolloutBatch, trajectories: Sequence[Trajectory], decode: Decode) -> Tensor:
    """The tokens of the actions: a bool mask, [S, L].

    Of each response the shortest span of tokens, the last such one, whose text holds the action. A
    response without an action (malformed) is marked whole.

    Args:
        batch: The packed trajectories.
        trajectories: The episodes that it was packed from.
        decode: Token ids to text, as `PromptEncoder.decode`.
    """
    index = batch.response_index
    mask = torch.zeros_like(index, dtype=torch.bool)
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    rows, columns = (index >= 0).nonzero(as_tuple=True)
    responses = index[rows, columns]
    order = responses.argsort(stable=True)
    places = order.split(torch.bincount(responses, minlength=len(turns)).tolist())
    ids = batch.input_ids.cpu()
    for turn, place in zip(turns, places, strict=True):
        row, column = rows[place], columns[place]
        start, end = action_span(turn, ids[row.cpu(), column.cpu()].tolist(), decode)
        mask[row[start:end], column[start:end]] = True
    return mask


def action_span(turn: Turn, ids: Sequence[int], decode: Decode) -> tuple[int, int]:
    """First token of the action and the one behind its last, within a response's ``ids``."""
    if turn.action is None:
        return 0, len(ids)

    action = " ".join(turn.action.split())

    def holds(part: Sequence[int]) -> bool:
        return action in " ".join(decode(part).split())

    if not holds(ids):
        return 0, len(ids)
    # Text that holds the action still does with tokens added at either end: bisection finds both.
    start = bisect_left(range(1, len(ids)), True, key=lambda at: not holds(ids[at:]))
    ends = range(start + 1, len(ids))
    return start, start + 1 + bisect_left(ends, True, key=lambda end: holds(ids[start:end]))
