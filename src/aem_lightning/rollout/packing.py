"""Trajectories to tensors, and rows to micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from aem_lightning.rollout.anchors import anchor_states
from aem_lightning.rollout.finite import NotFiniteError, place_of
from aem_lightning.types import AnchorBy, RolloutBatch, Trajectory, Turn


def pack(
    trajectories: Sequence[Trajectory],
    pad_id: int = 0,
    *,
    compact_filtering: bool = False,
    anchor_similarity: float = 1.0,
    anchor_by: AnchorBy = "observation",
    may_be_empty: bool = False,
    width: int = 0,
) -> RolloutBatch:
    """The rollout batch of ``trajectories``, on the CPU.

    Responses are numbered in the order of trajectories and turns. Token entropies that no engine
    gave are 0 here, and so is ``entropy``: the scoring pass fills them in. A trajectory with an
    ``infra_error`` or without a response leaves the loss, and its return is not judged: it is 0,
    and so are its rewards, whatever they were.

    Args:
        trajectories: The episodes.
        pad_id: Fills the rows up.
        compact_filtering: Trajectories that a limit cut leave the loss too. Their returns still
            count in the baseline of their group (DeepSWE's GRPO++).
        anchor_similarity: How alike two observations are that share an anchor; 1 is equality.
        anchor_by: What tells anchors apart; see `anchor_states`.
        may_be_empty: Without any response the batch has no row, as on a rank whose episodes broke.
        width: Tokens that rows are filled up to where none is longer.

    Raises:
        ValueError: There is no response where there has to be one.
        NotFiniteError: A log-probability or entropy is not finite.
    """
    responses = [
        (n, t, turn)
        for n, trajectory in enumerate(trajectories)
        for t, turn in enumerate(trajectory.turns)
    ]
    if not responses and not may_be_empty:
        raise ValueError(
            f"None of the {len(trajectories)} trajectories holds a response; nothing to train on."
        )
    rows = [row for trajectory in trajectories for row in trajectory.rows]
    first_row = [0, *accumulate(len(trajectory.rows) for trajectory in trajectories)]
    shape = (len(rows), max([width, *map(len, rows)]))
    input_ids = torch.full(shape, pad_id, dtype=torch.long)
    response_index = torch.full(shape, -1, dtype=torch.long)
    logprobs, entropies = torch.zeros(shape), torch.zeros(shape)
    for s, row in enumerate(rows):
        input_ids[s, : len(row)] = torch.tensor(row)
    for r, (n, _, turn) in enumerate(responses):
        s, span = first_row[n] + turn.row, slice(turn.start, turn.start + turn.length)
        response_index[s, span] = r
        logprobs[s, span] = torch.tensor(turn.logprobs)
        if turn.entropies is not None:
            entropies[s, span] = torch.tensor(turn.entropies)
    columns = {"log-probabilities": logprobs, "entropies": entropies}
    _check_finite(trajectories, responses, input_ids, response_index, columns)
    turns = [turn for _, _, turn in responses]
    counts = [bool(trajectory.turns) and not trajectory.infra_error for trajectory in trajectories]
    judged = torch.tensor(counts, dtype=torch.bool)
    truncated = torch.tensor([tr.truncated for tr in trajectories], dtype=torch.bool)
    length = torch.tensor([turn.length for turn in turns], dtype=torch.long)
    total_entropy = torch.tensor([sum(turn.entropies or (0.0,)) for turn in turns])
    returns = [tr.total_reward if n else 0.0 for tr, n in zip(trajectories, counts, strict=True)]
    return RolloutBatch(
        input_ids=input_ids,
        row_length=torch.tensor([len(row) for row in rows], dtype=torch.long),
        response_index=response_index,
        old_logprobs=logprobs,
        sampler_logprobs=logprobs,
        ref_logprobs=None,
        entropies=entropies,
        trajectory=torch.tensor([n for n, _, _ in responses], dtype=torch.long),
        turn=torch.tensor([t for _, t, _ in responses], dtype=torch.long),
        length=length,
        entropy=total_entropy / length.clamp(min=1),
        surprisal=torch.tensor([-sum(turn.logprobs) for turn in turns]),
        reward=torch.tensor(
            [turn.reward if counts[n] else 0.0 for n, _, turn in responses], dtype=torch.float32
        ),
        valid=torch.tensor([turn.is_valid for turn in turns], dtype=torch.bool),
        anchor=anchor_states(trajectories, anchor_similarity, anchor_by),
        group=torch.tensor([tr.group for tr in trajectories], dtype=torch.long),
        returns=torch.tensor(returns, dtype=torch.float32),
        loss_mask=judged & ~truncated if compact_filtering else judged,
        judged=judged,
        won=judged & torch.tensor([bool(tr.won) for tr in trajectories], dtype=torch.bool),
    )


def micro_batches(
    rows: Sequence[int], row_length: Tensor, max_tokens: int, *, padded: bool = True
) -> list[list[int]]:
    """``rows`` cut into lists of at most ``max_tokens`` tokens, the longest first.

    Padded rows count as many tokens as the longest of their list, packed ones their own. A row that
    is longer than the budget makes a list of its own. The longest comes first, so a budget that
    does not fit into memory shows at once.
    """
    lengths = row_length.tolist()
    batches: list[list[int]] = []
    load = longest = 0
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        added = longest if padded and load else lengths[row]
        if not batches or load + added > max_tokens:
            batches.append([])
            load, longest, added = 0, lengths[row], lengths[row]
        batches[-1].append(row)
        load += added
    return batches


def minibatches(num_rows: int, count: int, generator: torch.Generator) -> list[list[int]]:
    """A random partition of the rows into exactly ``count`` minibatches; few rows leave some empty.

    The *number* is fixed, not the size: data-parallel ranks hold different numbers of rows and
    still take the same number of optimizer steps.
    """
    order = torch.randperm(num_rows, generator=generator).tolist()
    bounds = [round(i * num_rows / count) for i in range(count + 1)]
    return [order[a:b] for a, b in pairwise(bounds)]


def _check_finite(
    trajectories: Sequence[Trajectory],
    responses: Sequence[tuple[int, int, Turn]],
    input_ids: Tensor,
    response_index: Tensor,
    columns: Mapping[str, Tensor],
) -> None:
    """Raise where the engine's ``columns``, [S, L] each, are not finite."""
    for name, values in columns.items():
        broken = (~values.isfinite()).nonzero()
        if len(broken):
            row, column = broken[0].tolist()
            n, t, _ = responses[int(response_index[row, column])]
            raise NotFiniteError(
                f"The engine's {name} are not finite",
                stage="rollout",
                tensor=name,
                place=place_of(trajectories[n], t),
                advice="the policy's logits were not. Where an update drove them there, a lower "
                "optimizer.lr=... mends it; where the engine computes in half precision, a wider "
                "one does",
                kept={"input_ids": input_ids[row : row + 1]},
            )
