"""What the update asks of a policy, micro-batch by micro-batch: scores, and the loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aem_lightning.algorithms import PPO, ClippedLoss, LossTerms, TokenColumns
from aem_lightning.modules.policy import Policy
from aem_lightning.modules.value import with_value_loss
from aem_lightning.types import RolloutBatch


@dataclass(frozen=True)
class MicroBatch:
    """Some rows of a rollout batch, cut to their longest; T is the number of their response tokens.

    Attributes:
        rows: [B] indices of the rows.
        input_ids: [B, l].
        mask: [B, l] bool, True at response tokens.
        responses: [T] the response of each token.
    """

    rows: Tensor
    input_ids: Tensor
    mask: Tensor
    responses: Tensor

    @classmethod
    def cut(cls, batch: RolloutBatch, rows: Sequence[int]) -> MicroBatch:
        index = torch.tensor(rows, device=batch.input_ids.device)
        width = int(batch.row_length[index].max())
        responses = batch.response_index[index, :width]
        mask = responses >= 0
        return cls(index, batch.input_ids[index, :width], mask, responses[mask])

    def gather(self, values: Tensor) -> Tensor:
        """Entries of an [S, L] tensor at this micro-batch's response tokens, [T]."""
        return values[self.rows, : self.mask.shape[1]][self.mask]

    def scatter(self, target: Tensor, values: Tensor) -> None:
        """Write [T] values into an [S, L] tensor at this micro-batch's response tokens."""
        part = target[self.rows, : self.mask.shape[1]]
        part[self.mask] = values.to(target.dtype)
        target[self.rows, : self.mask.shape[1]] = part


@torch.no_grad()
def score_rows(
    policy: Policy, batch: RolloutBatch, micro: Iterable[Sequence[int]], temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of every response token, both [S, L] float32, 0 elsewhere."""
    logprobs = torch.zeros(batch.input_ids.shape, device=batch.input_ids.device)
    entropies = torch.zeros_like(logprobs)
    for rows in micro:
        piece = MicroBatch.cut(batch, rows)
        lp, entropy = policy.score(piece.input_ids, piece.mask, temperature)
        piece.scatter(logprobs, lp)
        piece.scatter(entropies, entropy)
    return logprobs, entropies


def micro_batch_loss(
    policy: Policy,
    batch: RolloutBatch,
    rows: Sequence[int],
    advantages: Tensor,
    loss: ClippedLoss,
    temperature: float,
    *,
    on_policy: bool,
    chosen: Tensor | None = None,
    critic: PPO | None = None,
) -> LossTerms:
    """The summed loss of one micro-batch; ``advantages`` are [R], or [S, L] for those of tokens.

    With ``on_policy`` the log-probabilities of this very pass are the old ones: no separate pass is
    needed, and the ratio is 1 to the bit. ``chosen`` [S, L] are the tokens of covariance control;
    with a ``critic`` the value head learns too.
    """
    piece = MicroBatch.cut(batch, rows)
    hidden = policy.hidden_states(piece.input_ids, piece.mask)
    targets = piece.input_ids[piece.mask]
    logprobs, entropies = policy.score_hidden(hidden, targets, temperature)
    old = logprobs.detach() if on_policy else piece.gather(batch.old_logprobs)
    kept = batch.response_mask[piece.responses]

    def column(values: Tensor | None) -> Tensor | None:
        return None if values is None else piece.gather(values)[kept]

    columns = TokenColumns(
        responses=piece.responses[kept],
        lengths=batch.length[piece.responses][kept],
        sampler_logprobs=column(batch.sampler_logprobs),
        chosen=column(chosen),
    )
    spread = advantages[piece.responses] if advantages.ndim == 1 else piece.gather(advantages)
    reference = column(batch.ref_logprobs)
    terms = loss(logprobs[kept], old[kept], reference, entropies[kept], spread[kept], columns)
    if critic is None or policy.value_head is None:
        return terms
    values = policy.value_head(hidden if critic.train_trunk else hidden.detach())[kept]
    known = column(batch.values), column(batch.value_targets)
    return with_value_loss(critic, terms, values, *known, loss.weights(values, columns))
