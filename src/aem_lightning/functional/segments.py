"""Sums, means and ranges over segments: the rows of a table that share an id."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def segment_ids(*columns: Tensor) -> tuple[Tensor, int]:
    """Dense ids 0..K-1 of the distinct rows of the columns, and their number K.

    Args:
        columns: Integer tensors of one shape [N]; rows that agree in all of them share an id.

    Returns:
        Ids [N] and K.

    Example:
        >>> segment_ids(torch.tensor([7, 7, 3]), torch.tensor([0, 1, 0]))
        (tensor([1, 2, 0]), 3)
    """
    if len(columns) == 1:
        values, ids = torch.unique(columns[0], return_inverse=True)
    else:
        values, ids = torch.unique(torch.stack(columns), dim=1, return_inverse=True)
    return ids, int(values.shape[-1])


def segment_sum(values: Tensor, ids: Tensor, count: int) -> Tensor:
    """The sum of each segment; empty ones give 0.

    Args:
        values: [N].
        ids: Segment of each value, [N], in 0..count-1.
        count: Number of segments K.

    Returns:
        [K].

    Example:
        >>> segment_sum(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([0, 0, 2]), 3)
        tensor([3., 0., 5.])
    """
    return values.new_zeros(count).index_add(0, ids, values)


def segment_mean(values: Tensor, ids: Tensor, count: int) -> Tensor:
    """The mean of each segment, [K]; empty ones give 0.

    Args:
        values: [N].
        ids: Segment of each value, [N], in 0..count-1.
        count: Number of segments K.

    Example:
        >>> segment_mean(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([0, 0, 2]), 3)
        tensor([1.5000, 0.0000, 5.0000])
    """
    sizes = segment_sum(torch.ones_like(values), ids, count)
    return segment_sum(values, ids, count) / sizes.clamp(min=1)


def segment_range(values: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of each segment, [K] each; empty ones give +inf and -inf.

    Args:
        values: [N], floating point.
        ids: Segment of each value, [N], in 0..count-1.
        count: Number of segments K.

    Example:
        >>> segment_range(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([0, 0, 1]), 2)
        (tensor([1., 5.]), tensor([2., 5.]))
    """
    low = values.new_full((count,), torch.inf).scatter_reduce(0, ids, values, "amin")
    high = values.new_full((count,), -torch.inf).scatter_reduce(0, ids, values, "amax")
    return low, high


def prompt_ids(input_ids: Tensor, response_index: Tensor, num_responses: int) -> Tensor:
    """Ids of the prompts that responses answer, [R]: equal where all tokens before them are.

    Args:
        input_ids: [S, L].
        response_index: The response of each token, [S, L]; -1 outside responses.
        num_responses: Number of responses R.

    Returns:
        [R]; 0 for a response without tokens.

    Example:
        >>> input_ids = torch.tensor([[7, 1], [7, 2], [8, 1]])
        >>> prompt_ids(input_ids, torch.tensor([[-1, 0], [-1, 1], [-1, 2]]), 3)
        tensor([1, 1, 2])
    """
    found = torch.zeros(num_responses, dtype=torch.long)
    known: dict[tuple[int, ...], int] = {}
    before = torch.cat([torch.full_like(response_index[:, :1], -1), response_index[:, :-1]], dim=1)
    starts = ((response_index >= 0) & (response_index != before)).nonzero().tolist()
    rows, owners = input_ids.tolist(), response_index.tolist()
    for row, start in starts:
        prompt = tuple(rows[row][:start])
        found[owners[row][start]] = known.setdefault(prompt, len(known) + 1)
    return found.to(input_ids.device)


def check_rows(**columns: Tensor | None) -> None:
    """Raise unless every given column is one-dimensional and as long as the first.

    Raises:
        ValueError: Naming each column with its shape.

    Example:
        >>> check_rows(returns=torch.zeros(2), group=torch.zeros(3))
        Traceback (most recent call last):
        ValueError: one entry a row is needed, got returns [2], group [3]
    """
    given = {name: list(c.shape) for name, c in columns.items() if c is not None}
    first = next(iter(given.values()))
    if len(first) != 1 or any(shape != first for shape in given.values()):
        raise ValueError(f"one entry a row is needed, got {_listed(given)}")


def check_shapes(**tensors: Tensor) -> None:
    """Raise unless all tensors have one shape: what differs would broadcast.

    Raises:
        ValueError: Naming each tensor with its shape.

    Example:
        >>> check_shapes(logprobs=torch.zeros(2, 1), advantages=torch.zeros(2))
        Traceback (most recent call last):
        ValueError: one shape is needed, got logprobs [2, 1], advantages [2]
    """
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        given = {name: list(tensor.shape) for name, tensor in tensors.items()}
        raise ValueError(f"one shape is needed, got {_listed(given)}")


def _listed(shapes: Mapping[str, list[int]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())


def counted_rows(
    values: Tensor, group: Tensor, mask: Tensor | None, name: str
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Indices, values and dense group ids of the rows that count, and the number of groups.

    Raises:
        ValueError: A value that counts is not finite; the message says which of ``name``.
    """
    keep = torch.ones_like(group, dtype=torch.bool) if mask is None else mask
    keep = keep.nonzero()[:, 0]
    broken = keep[~values[keep].isfinite()]
    if broken.numel():
        raise ValueError(
            f"{name} must be finite; those at {broken.tolist()} are {values[broken].tolist()}, of "
            f"the groups (tasks of the batch) {group[broken].tolist()}"
        )
    return keep, values[keep], *segment_ids(group[keep])
