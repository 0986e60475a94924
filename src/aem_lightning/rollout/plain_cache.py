"""transformers' own caches of many episodes: told apart by row, and joined for a decode step.

A cache of transformers is a list of layers, and a layer is a handful of tensors with an episode a
row: keys and values [b, heads, tokens, size], of a sliding window its last tokens, and the states
of a convolution or a recurrence, which have no tokens. Rows of different lengths are joined by
padding keys and values on the left; states need no padding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(slots=True)
class Part:
    """One cache of transformers.

    Attributes:
        cache: The cache; of a model that keeps none, all ids [1, tokens].
        lengths: Tokens of each of its rows.
    """

    cache: Any
    lengths: list[int]


class PlainCache:
    """Which row's keys, values and states lie where.

    Memory is what the open episodes hold, plus a copy of the running ones while the batch changes.

    Attributes:
        blank: A cache of one token, which a stored one is put into.
    """

    def __init__(self, blank: Any) -> None:
        self.blank = blank
        self._at: dict[int, tuple[Part, int]] = {}

    def alone(self, row: int) -> Part | None:
        """The row's own cache, taken out of the batch that it was in; ``None`` where it has none.

        A batch of which nobody is left is freed.
        """
        if row not in self._at:
            return None
        part, index = self._at[row]
        if len(part.lengths) > 1:
            part = take(part, [index])
            self._at[row] = part, 0
        return part

    def together(self, rows: Sequence[int]) -> Part:
        """One cache of these ``rows``, in this order; all of them hold something."""
        if len(rows) == 1:
            return self.alone(rows[0]) or Part(None, [])
        parts: dict[int, tuple[Part, list[int]]] = {}
        for row in rows:
            part, _ = self._at[row]
            parts.setdefault(id(part), (part, []))[1].append(row)
        pieces = []
        for part, members in parts.values():
            mine = [self._at[row][1] for row in members]
            pieces.append(part if mine == list(range(len(part.lengths))) else take(part, mine))
            for row in self._others(part, members):
                self.alone(row)
        order = [row for _, members in parts.values() for row in members]
        joined = pieces[0] if len(pieces) == 1 else join(pieces)
        if order != list(rows):
            joined = take(joined, [order.index(row) for row in rows])
        self._at.update({row: (joined, index) for index, row in enumerate(rows)})
        return joined

    def set(self, row: int, part: Part | None) -> None:
        """Give ``row`` a cache of its own, or none."""
        self._at.pop(row, None)
        if part is not None:
            self._at[row] = part, 0

    def crops(self, row: int, tokens: int) -> bool:
        """Whether the row can go back to its first ``tokens``: a recurrent state cannot."""
        part = self.alone(row)
        if part is None or tokens in (0, part.lengths[0]):
            return True
        if isinstance(part.cache, Tensor):
            return True
        layers = getattr(part.cache, "layers", [])
        states = any(hasattr(layer, "conv_states") for layer in layers)
        full = any(
            part.lengths[0] >= getattr(layer, "sliding_window", math.inf) for layer in layers
        )
        return bool(getattr(part.cache, "is_croppable", False)) and not states and not full

    def cut(self, row: int, tokens: int) -> None:
        """Go back to the first ``tokens`` of a row, as `crops` has allowed."""
        if row not in self._at or tokens == self.length(row):
            return
        part = self.alone(row)
        if part is None or tokens == 0:
            self.set(row, None)
            return
        if isinstance(part.cache, Tensor):
            part.cache = part.cache[:, :tokens]
        else:
            part.cache.crop(tokens - part.lengths[0])
        part.lengths = [tokens]

    def length(self, row: int) -> int:
        """Tokens that a row holds."""
        part, index = self._at.get(row, (Part(None, [0]), 0))
        return part.lengths[index]

    def copy(self, source: Sequence[int], target: Sequence[int], tokens: int) -> None:
        """Copy the first ``tokens`` of the source rows to the target rows, all at once.

        A row that is a source and a target is moved with all that it has.
        """
        found = {row: self._at.get(row) for row in source}
        for row, other in zip(target, source, strict=True):
            if other not in target:
                part = self.alone(other)
                self.set(row, copy.deepcopy(part))
                self.cut(row, tokens)
            elif (place := found[other]) is not None:
                self._at[row] = place
            else:
                self._at.pop(row, None)

    def held(self, tokens: int, most: int) -> dict[str, Any] | None:
        """What every row holds, on the CPU; ``None`` above ``most`` bytes or of a cache unknown."""
        parts = {row: self.alone(row) for row in list(self._at)}
        rows = {row: (part.lengths[0], _plain(part.cache)) for row, part in parts.items() if part}
        size = sum(sum(t.nbytes for t in _tensors(cache)) for _, cache in rows.values())
        if size > most or any(cache is None for _, cache in rows.values()):
            return None
        return {
            "length": {row: length for row, (length, _) in rows.items()},
            "cache": {row: _moved(cache, torch.device("cpu")) for row, (_, cache) in rows.items()},
        }

    def fill(self, tensors: Mapping[str, Any], device: torch.device) -> None:
        """Put back what `held` gave."""
        for row, length in tensors["length"].items():
            stored = _moved(tensors["cache"][row], device)
            cache = stored
            if not isinstance(stored, Tensor):
                cache = copy.deepcopy(self.blank)
                for layer, values in zip(cache.layers, stored, strict=True):
                    vars(layer).update(values)
            self.set(row, Part(cache, [length]))

    def _others(self, part: Part, members: Sequence[int]) -> list[int]:
        return [row for row, (its, _) in self._at.items() if its is part and row not in members]


def has_tokens(cache: Any) -> bool:
    """Whether a cache holds keys of tokens, and not states alone, which are never padded."""
    layers = getattr(cache, "layers", [])
    return any(getattr(layer, "keys", None) is not None for layer in layers)


def join(parts: Sequence[Part]) -> Part:
    """The rows of ``parts`` in one cache, keys and values padded on the left to the longest.

    Raises:
        TypeError: A layer of a kind that is not known.
    """
    longest = max(parts, key=lambda part: max(part.lengths))
    cache = copy.copy(longest.cache)
    cache.layers = [
        _join_layer(list(layers), lead)
        for lead, *layers in zip(
            longest.cache.layers, *(part.cache.layers for part in parts), strict=True
        )
    ]
    return Part(cache, [length for part in parts for length in part.lengths])


def take(part: Part, rows: Sequence[int]) -> Part:
    """A copy of some rows of a cache, without padding that none of them needs."""
    lengths = [part.lengths[row] for row in rows]
    cache = copy.copy(part.cache)
    cache.layers = [_take_layer(layer, rows, max(lengths)) for layer in part.cache.layers]
    return Part(cache, lengths)


def _join_layer(layers: list[Any], lead: Any) -> Any:
    joined = copy.copy(lead)
    for name, value in _of_rows(lead).items():
        values = [getattr(layer, name) for layer in layers]
        if isinstance(value, dict):
            setattr(joined, name, {key: _cat([v[key] for v in values]) for key in value})
        else:
            width = value.shape[-2]
            padded = [pad(v, (0, 0, width - v.shape[-2], 0)) for v in values]
            setattr(joined, name, torch.cat(padded))
    return joined


def _take_layer(layer: Any, rows: Sequence[int], longest: int) -> Any:
    taken = copy.copy(layer)
    for name, value in _of_rows(layer).items():
        if isinstance(value, dict):
            picked = {k: v[list(rows)] if isinstance(v, Tensor) else v for k, v in value.items()}
            setattr(taken, name, picked)
        else:
            start = max(0, value.shape[-2] - longest)
            setattr(taken, name, value[:, :, start:][list(rows)])
    if hasattr(taken, "cumulative_length"):
        taken.cumulative_length = longest
    return taken


def _of_rows(layer: Any) -> dict[str, Any]:
    """What of a layer has a row an episode: keys and values, and dictionaries of states."""
    found: dict[str, Any] = {}
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            found[name] = value
        elif isinstance(value, Tensor) and value.ndim:
            if name in ("keys", "values") and value.ndim == 4:
                found[name] = value
            elif value.numel():
                raise TypeError(f"{type(layer).__name__}.{name} has {list(value.shape)}")
    return found


def _cat(values: list[Any]) -> Any:
    return torch.cat(values) if isinstance(values[0], Tensor) else values[0]


def _plain(cache: Any) -> Any:
    """A cache as a list of dictionaries of tensors and numbers; ``None`` of one unknown."""
    if isinstance(cache, Tensor):
        return cache
    kinds = (Tensor, dict, int, type(None))
    layers = getattr(cache, "layers", None)
    return layers and [
        {name: value for name, value in vars(layer).items() if isinstance(value, kinds)}
        for layer in layers
    ]


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, dict | list):
        return [t for v in (tree.values() if isinstance(tree, dict) else tree) for t in _tensors(v)]
    return [tree] if isinstance(tree, Tensor) else []


def _moved(tree: Any, device: torch.device) -> Any:
    if isinstance(tree, dict):
        return {name: _moved(value, device) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_moved(value, device) for value in tree]
    return tree.to(device, copy=True).contiguous() if isinstance(tree, Tensor) else tree
