"""What the update asks of a policy, micro-batch by micro-batch: scores, and the loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aem_lightning.algorithms.losses import ClippedLoss, LossTerms
from aem_lightning.modules.policy import Policy
from aem_lightning.types import RolloutBatch


@dataclass(frozen=True)
class MicroBatch:
    """Some rows of a rollout batch, cut to their longest; T is the number of their response tokens.

    Attributes:
        rows: [B] indices of the rows.
        input_ids: [B, l].
        mask: [B, l] bool, True at response tokens.
        responses: [T] the response of each token.
        lengths: Tokens of each row.
    """

    rows: Tensor
    input_ids: Tensor
    mask: Tensor
    responses: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def cut(cls, batch: RolloutBatch, rows: Sequence[int]) -> MicroBatch:
        index = torch.tensor(rows, device=batch.input_ids.device)
        lengths = tuple(batch.row_length[index].tolist())
        width = max(lengths)
        responses = batch.response_index[index, :width]
        mask = responses >= 0
        return cls(index, batch.input_ids[index, :width], mask, responses[mask], lengths)

    def score(self, policy: Policy, temperature: float, *, packed: bool) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of the response tokens, both [T].

        Packed, the rows lie one after the other without their padding.
        """
        if not packed:
            return policy.score(self.input_ids, self.mask, temperature)
        columns = torch.arange(self.mask.shape[1], device=self.mask.device)
        ends = torch.tensor(self.lengths, device=self.mask.device)
        inside = columns < ends[:, None]
        ids, mask = self.input_ids[inside][None], self.mask[inside][None]
        return policy.score(ids, mask, temperature, self.lengths)

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
    policy: Policy,
    batch: RolloutBatch,
    micro: Iterable[Sequence[int]],
    temperature: float,
    *,
    packed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of every response token, both [S, L] float32, 0 elsewhere."""
    logprobs = torch.zeros(batch.input_ids.shape, device=batch.input_ids.device)
    entropies = torch.zeros_like(logprobs)
    for rows in micro:
        piece = MicroBatch.cut(batch, rows)
        lp, entropy = piece.score(policy, temperature, packed=packed)
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
    packed: bool = False,
) -> LossTerms:
    """The summed loss of one micro-batch; ``advantages`` are [R].

    With ``on_policy`` the log-probabilities of this very pass are the old ones: no separate pass is
    needed, and the ratio is 1 to the bit.
    """
    piece = MicroBatch.cut(batch, rows)
    logprobs, entropies = piece.score(policy, temperature, packed=packed)
    old = logprobs.detach() if on_policy else piece.gather(batch.old_logprobs)
    reference = None if batch.ref_logprobs is None else piece.gather(batch.ref_logprobs)
    kept = batch.response_mask[piece.responses]
    return loss(
        logprobs[kept],
        old[kept],
        None if reference is None else reference[kept],
        entropies[kept],
        advantages[piece.responses][kept],
    )
