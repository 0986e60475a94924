"""What the update asks of a policy, micro-batch by micro-batch: scores, and the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aem_lightning.algorithms import PPO, Loss, LossTerms, TokenColumns
from aem_lightning.modules.memory import TokenBudget
from aem_lightning.modules.policy import Policy
from aem_lightning.modules.value import with_value_loss
from aem_lightning.rollout.adapters import AdapterCopies
from aem_lightning.rollout.slot_cache import compute_dtype
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

    def hidden(self, policy: Policy, *, packed: bool) -> Tensor:
        """The hidden states that predict the response tokens, [T, d].

        Packed, the rows lie one after the other without their padding.
        """
        if not packed:
            return policy.hidden_states(self.input_ids, self.mask)
        columns = torch.arange(self.mask.shape[1], device=self.mask.device)
        ends = torch.tensor(self.lengths, device=self.mask.device)
        inside = columns < ends[:, None]
        ids, mask = self.input_ids[inside][None], self.mask[inside][None]
        return policy.hidden_states(ids, mask, self.lengths)

    def score(self, policy: Policy, temperature: float, *, packed: bool) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of the response tokens, both [T]."""
        return policy.score_hidden(self.hidden(policy, packed=packed), self.targets, temperature)

    @property
    def targets(self) -> Tensor:
        """The response tokens, [T]."""
        return self.input_ids[self.mask]

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
    parts: Iterable[Sequence[int]],
    temperature: float,
    budget: TokenBudget,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of the response tokens of some rows, both [S, L] float32.

    Args:
        policy: The policy.
        batch: The rollout batch; rows that are not scored keep what it holds of both.
        parts: Rows to score. No micro-batch spans two parts: cut like a later pass, rows get the
            same rounding as there.
        temperature: Sampling temperature.
        budget: What micro-batches may hold.
    """
    logprobs, entropies = batch.old_logprobs.clone(), batch.entropies.clone()

    def score(micro: Iterator[list[int]]) -> None:
        for rows in micro:
            piece = MicroBatch.cut(batch, rows)
            lp, entropy = piece.score(policy, temperature, packed=budget.packed)
            piece.scatter(logprobs, lp)
            piece.scatter(entropies, entropy)

    # What autocast casts anew in every micro-batch is cast once; without it nothing is.
    adapters = AdapterCopies(policy.causal_lm, compute_dtype(logprobs.device, torch.float32))
    adapters.refresh()
    with adapters.in_place():
        for rows in parts:
            budget.run(score, rows, batch.row_length)
    return logprobs, entropies


@torch.no_grad()
def fill_values(policy: Policy, batch: RolloutBatch, critic: PPO, budget: TokenBudget) -> None:
    """Give the batch the values before the update, and what the value head should have said."""
    head = policy.value_head
    assert head is not None
    values = torch.zeros(batch.input_ids.shape, device=batch.input_ids.device)

    def fill(micro: Iterator[list[int]]) -> None:
        for rows in micro:
            piece = MicroBatch.cut(batch, rows)
            piece.scatter(values, head(piece.hidden(policy, packed=budget.packed)))

    budget.run(fill, range(len(values)), batch.row_length)
    batch.values = values
    batch.value_targets = critic.targets(batch)


@dataclass(frozen=True)
class Objective:
    """The loss of a rollout batch, as a function of some of its rows.

    Attributes:
        policy: The policy.
        batch: The rollout batch.
        advantages: Of each response, [R], or [S, L] for those of tokens.
        loss: The loss of tokens.
        temperature: Sampling temperature.
        on_policy: The log-probabilities of the pass itself are the old ones: no separate pass is
            needed, and the ratio is 1 to the bit.
        packed: Whether rows are packed, else padded.
        chosen: The tokens of covariance control, [S, L] bool.
        critic: With one, the value head learns too.
        reshape: What a modulation makes of advantages of tokens, given their log-probabilities.
    """

    policy: Policy
    batch: RolloutBatch
    advantages: Tensor
    loss: Loss
    temperature: float
    on_policy: bool
    packed: bool
    chosen: Tensor | None = None
    critic: PPO | None = None
    reshape: Callable[[Tensor, Tensor], Tensor] | None = None

    def __call__(self, rows: Sequence[int]) -> LossTerms:
        """The summed loss of one micro-batch."""
        batch = self.batch
        piece = MicroBatch.cut(batch, rows)
        hidden = piece.hidden(self.policy, packed=self.packed)
        logprobs, entropies = self.policy.score_hidden(hidden, piece.targets, self.temperature)
        old = logprobs.detach() if self.on_policy else piece.gather(batch.old_logprobs)
        kept = batch.response_mask[piece.responses]

        def column(values: Tensor | None) -> Tensor | None:
            return None if values is None else piece.gather(values)[kept]

        columns = TokenColumns(
            responses=piece.responses[kept],
            lengths=batch.length[piece.responses][kept],
            sampler_logprobs=column(batch.sampler_logprobs),
            chosen=column(self.chosen),
        )
        of_tokens = self.advantages.ndim == 2
        spread = piece.gather(self.advantages) if of_tokens else self.advantages[piece.responses]
        if self.reshape is not None:
            spread = self.reshape(spread, logprobs.detach())
        terms = self.loss(
            logprobs[kept],
            old[kept],
            column(batch.ref_logprobs),
            entropies[kept],
            spread[kept],
            columns,
        )
        if self.critic is None or self.policy.value_head is None:
            return terms
        seen = hidden if self.critic.train_trunk else hidden.detach()
        values, targets = column(batch.values), column(batch.value_targets)
        assert values is not None
        assert targets is not None
        news = self.policy.value_head(seen)[kept]
        return with_value_loss(self.critic, terms, news, values, targets)

    def no_stats(self) -> dict[str, Tensor]:
        """The sums for the log of a rank that has no row to compute: zeros, by the same names."""
        none = self.batch.old_logprobs.new_zeros(0)
        index = none.long()

        def column(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.new_zeros(0)

        columns = TokenColumns(
            index, index, column(self.batch.sampler_logprobs), column(self.chosen)
        )
        terms = self.loss(none, none, column(self.batch.ref_logprobs), none, none, columns)
        if self.critic is not None:
            terms = with_value_loss(self.critic, terms, none, none, none)
        return terms.stats
