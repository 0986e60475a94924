"""Advantages of steps by the way to them and from them: GraphGPO's distances, HGPO's histories."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from aem_lightning.functional.advantages import grpo_advantages
from aem_lightning.functional.segments import (
    check_rows,
    counted_rows,
    segment_ids,
    segment_mean,
)

SUCCESS = "success"


def graph_rewards(
    group: Tensor,
    anchor: Tensor,
    trajectory: Tensor,
    turn: Tensor,
    won: Tensor,
    *,
    success: float = 10.0,
    decay: float = 0.1,
    normalize_distance: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """What each response is worth by how near to success it leads: GraphGPO's step reward.

    The observations of a group are nodes, and each response is an edge from the one that it
    answers to the next. The last response of a won trajectory leads to the node of success, that
    of another to a node of its own, since a batch keeps no observation after it. With d the
    shortest distance to success, and the greatest of the group plus 1 where success is not
    reached, the reward is ``success * decay ** d(h')``, h' being where the response leads.
    Source: arXiv 2605.26684; transitions are taken to be deterministic.

    Args:
        group: The group of each response, [R], any integers.
        anchor: Id of the observation that it answers, [R].
        trajectory: Its trajectory, [R].
        turn: Its place in time there, [R].
        won: Whether that trajectory was won, [R] bool.
        success: The reward of a response that leads to success.
        decay: In (0, 1): what each further step costs.
        normalize_distance: The exponent is ``d(h') - d(h) + 1``: the progress that was made.
        mask: Responses that count, [R] bool; the others are no edges and have reward 0.

    Returns:
        [R]; 0 in a group without success.

    Raises:
        ValueError: Shapes that differ, or a decay out of range.

    Example:
        >>> group, anchor = torch.tensor([0, 0, 0]), torch.tensor([5, 6, 5])
        >>> trajectory, turn = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0])
        >>> won = torch.tensor([True, True, False])
        >>> graph_rewards(group, anchor, trajectory, turn, won, decay=0.5)
        tensor([ 5.0000, 10.0000,  1.2500])
    """
    if not 0 < decay < 1:
        raise ValueError(f"decay={decay} is not allowed: a number in (0, 1)")
    check_rows(group=group, anchor=anchor, trajectory=trajectory, turn=turn, won=won, mask=mask)
    rewards = torch.zeros(group.shape, device=group.device)
    counted = range(len(group)) if mask is None else mask.nonzero()[:, 0].tolist()
    columns = [column.tolist() for column in (group, trajectory, turn, anchor, won)]
    of_group: dict[int, list[int]] = defaultdict(list)
    for r in sorted(counted, key=lambda r: tuple(column[r] for column in columns[:3])):
        of_group[columns[0][r]].append(r)
    _, owner, _, node, success_of = columns
    for responses in of_group.values():
        leads: dict[int, Hashable] = {}
        for r, following in zip(responses, [*responses[1:], None], strict=True):
            if following is not None and owner[following] == owner[r]:
                leads[r] = node[following]
            else:
                leads[r] = SUCCESS if success_of[r] else ("end", owner[r])
        distance = _distances({r: (node[r], to) for r, to in leads.items()})
        if len(distance) == 1:  # success alone
            continue
        beyond = max(distance.values()) + 1
        for r, to in leads.items():
            exponent = distance.get(to, beyond)
            if normalize_distance:
                exponent += 1 - distance.get(node[r], beyond)
            rewards[r] = success * decay**exponent
    return rewards


def _distances(edges: Mapping[int, tuple[Hashable, Hashable]]) -> dict[Hashable, int]:
    """Steps from each node to success, by breadth-first search; nodes that reach it alone."""
    sources: dict[Hashable, set[Hashable]] = defaultdict(set)
    for start, end in edges.values():
        sources[end].add(start)
    distance: dict[Hashable, int] = {SUCCESS: 0}
    queue: deque[Hashable] = deque([SUCCESS])
    while queue:
        reached = queue.popleft()
        for start in sources[reached] - distance.keys():
            distance[start] = distance[reached] + 1
            queue.append(start)
    return distance


def hgpo_advantages(
    step_returns: Tensor,
    group: Tensor,
    anchor: Tensor,
    trajectory: Tensor,
    turn: Tensor,
    *,
    history_length: int = 2,
    base: Tensor | None = None,
    power: float = 1.0,
    normalize_std: bool = True,
    eps: float = 1e-6,
    mask: Tensor | None = None,
) -> Tensor:
    """Advantages among responses that share 1, 2, ... of their last observations, averaged.

    For each k up to ``history_length + 1`` the responses of a group that answer the same k last
    observations are compared: ``a_k = (R - mean) / (std + eps)`` with the population's standard
    deviation; a response alone has none. The advantage is the mean of its ``a_k`` that are not 0,
    weighted by ``(k + 1) ** power``. HGPO (arXiv 2602.22817, equation 7): under a windowed memory
    equal observations may answer to unlike prompts.

    Args:
        step_returns: Discounted return from each turn on, [R].
        group: The group of each response, [R], any integers.
        anchor: Id of the observation that it answers, [R].
        trajectory: Its trajectory, [R].
        turn: Its place in time there, [R].
        history_length: K, the earlier turns that a prompt shows.
        base: An advantage with k = 0 beside them, [R], e.g. GRPO's.
        power: How much a longer shared history counts.
        normalize_std: Divide by the standard deviation.
        eps: Added to the standard deviation.
        mask: Responses that count, [R] bool; the others enter no statistic and have advantage 0.

    Returns:
        [R].

    Raises:
        ValueError: Shapes that differ, or a return that is not finite.

    Example:
        >>> returns, group = torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
        >>> hgpo_advantages(returns, group, torch.tensor([8, 8]), torch.tensor([0, 1]), group)
        tensor([ 1.0000, -1.0000])
    """
    columns = {"group": group, "anchor": anchor, "trajectory": trajectory, "turn": turn}
    check_rows(step_returns=step_returns, base=base, mask=mask, **columns)
    counted = torch.ones_like(group, dtype=torch.bool) if mask is None else mask
    earlier = _earlier(trajectory, turn)
    total, weights = torch.zeros_like(step_returns), torch.zeros_like(step_returns)
    found = [] if base is None else [(0, base)]
    key, known = segment_ids(group, anchor)[0], counted  # of the k last observations
    for k in range(1, history_length + 2):
        found.append((k, _normalised(step_returns, key, known, normalize_std, eps)))
        known = known & (earlier >= 0) & known[earlier]
        key, _ = segment_ids(key, torch.where(known, key[earlier], -1))
    for k, advantages in found:
        weight = torch.where(counted & (advantages != 0), float(k + 1) ** power, 0.0)
        total, weights = total + weight * advantages, weights + weight
    return torch.where(weights > 0, total / weights, 0.0)


def _earlier(trajectory: Tensor, turn: Tensor) -> Tensor:
    """The response before each in its trajectory, [R]; -1 before the first."""
    place = {key: r for r, key in enumerate(zip(trajectory.tolist(), turn.tolist(), strict=True))}
    before = [place.get((n, t - 1), -1) for n, t in place]
    return torch.tensor(before, dtype=torch.long, device=turn.device)


def _normalised(
    returns: Tensor, key: Tensor, mask: Tensor, normalize_std: bool, eps: float
) -> Tensor:
    """Returns centred within those that share a key, over their population's deviation, [R]."""
    centred = grpo_advantages(returns, key, normalize_std=False, mask=mask)
    if normalize_std:
        keep, values, ids, count = counted_rows(centred, key, mask, "returns")
        std = segment_mean(values.square(), ids, count).sqrt()
        centred = centred.index_copy(0, keep, values / (std + eps)[ids])
    return centred
