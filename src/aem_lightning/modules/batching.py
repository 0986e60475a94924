"""A rollout batch as the settings want it, and what an update needs to know of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aem_lightning.algorithms import AEM, CovarianceControl, Modulation, Stacked
from aem_lightning.collectives import of_each_rank, whole_columns
from aem_lightning.functional.losses import Aggregation
from aem_lightning.modules.settings import RolloutSettings
from aem_lightning.rollout import PromptEncoder, action_mask, pack
from aem_lightning.types import RolloutBatch, Trajectory


def make_batch(
    trajectories: Sequence[Trajectory],
    settings: RolloutSettings,
    modulation: Modulation,
    encoder: PromptEncoder,
) -> RolloutBatch:
    """The rollout batch, on the CPU, with the tokens of actions where the modulation asks.

    Every rank must call it: rows are padded to the longest of all, as those of one process are.
    """
    longest = max((len(row) for t in trajectories for row in t.rows), default=0)
    batch = pack(
        trajectories,
        encoder.pad_id,
        width=max(of_each_rank(longest)),
        compact_filtering=settings.compact_filtering,
        anchor_similarity=settings.anchor_similarity,
        anchor_by=settings.anchor_by,
        may_be_empty=True,
    )
    if wants_actions(modulation):
        batch.action_mask = action_mask(batch, trajectories, encoder.decode)
    return batch


def wants_actions(modulation: Modulation) -> bool:
    """Whether a modulation, or a part of it, looks at the tokens of actions alone."""
    if isinstance(modulation, Stacked):
        return wants_actions(modulation.first) or wants_actions(modulation.then)
    return isinstance(modulation, AEM) and modulation.tokens == "action"


def entropy_sums(batch: RolloutBatch) -> Tensor:
    """The sum of token entropies and the number of tokens, [2]; both add up over ranks.

    Of the episodes that are judged: broken ones say nothing.
    """
    kept = batch.judged[batch.trajectory]
    length = batch.length[kept]
    return torch.stack([(batch.entropy[kept] * length).sum(), length.sum().float()])


def trained_units(batch: RolloutBatch, aggregation: Aggregation) -> Tensor:
    """What the loss is a mean over, counted in each row, [S]: tokens, or responses.

    A response is within one row, so summed over the rows of a minibatch and over ranks these are
    the units of ``aggregation_weights``.
    """
    inside = batch.response_index >= 0
    if aggregation == "token":
        kept = batch.response_mask[batch.response_index.clamp(min=0)]
        return (inside & kept).sum(dim=1).float()
    row_of = torch.full_like(batch.length, -1)
    row_of[batch.response_index[inside]] = inside.nonzero()[:, 0]
    kept = batch.response_mask & (row_of >= 0)
    return torch.bincount(row_of[kept], minlength=len(batch.row_length)).float()


def choose_tokens(
    control: CovarianceControl | None, batch: RolloutBatch, advantages: Tensor, seed: int
) -> Tensor | None:
    """The tokens that covariance control chooses, [S, L] bool; ``None`` without it.

    It chooses from the batches of all ranks.

    Args:
        control: Clip-Cov, KL-Cov or none.
        batch: Its old log-probabilities are those of the policy that sampled.
        advantages: Of the loss: [R], or [S, L] for those of tokens.
        seed: Of the random choice.
    """
    if control is None:
        return None
    inside = batch.response_index >= 0
    responses = batch.response_index[inside]
    values = advantages[responses] if advantages.ndim == 1 else advantages[inside]
    generator = torch.Generator().manual_seed(seed)
    columns = batch.old_logprobs[inside], values, batch.response_mask[responses]
    (logprobs, values, mask), mine = whole_columns(columns, batch.response_group[responses])
    chosen = torch.zeros_like(inside)
    chosen[inside] = control.select(logprobs, values, mask, generator)[mine]
    return chosen
