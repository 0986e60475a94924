"""How many tokens a pass holds at once, and what happens when memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from aem_lightning.beats import beat
from aem_lightning.modules.attention import is_packed
from aem_lightning.modules.policy import Policy
from aem_lightning.modules.settings import UpdateSettings
from aem_lightning.modules.sharding import in_step
from aem_lightning.rollout import micro_batches
from aem_lightning.rollout.shortage import is_out_of_memory

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class TokenBudget:
    """Cuts rows into micro-batches of at most ``tokens``, smaller ones after memory has run out.

    Their rows are packed, or padded to the longest. Before they get smaller, ``release`` is asked
    to give back what a pass does not need, and says whether there was some. Ranks that share
    ``policy`` make as many passes each, so none of them can start again.
    """

    def __init__(
        self,
        tokens: int,
        *,
        packed: bool,
        release: Callable[[], bool] | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.tokens = tokens
        self.packed = packed
        self._release = release or bool
        self._shared = policy if policy is not None and policy.sharded else None

    @classmethod
    def of(cls, settings: UpdateSettings, policy: Policy, engine: object) -> TokenBudget:
        """That of a run's ``settings``."""
        packed = is_packed(settings.packing, policy.causal_lm)
        release = getattr(engine, "release", None)
        return cls(settings.micro_batch_tokens, packed=packed, release=release, policy=policy)

    def cut(self, rows: Sequence[int], lengths: Tensor) -> list[list[int]]:
        """The micro-batches of ``rows``, the longest rows first; ``lengths`` are [S]."""
        return micro_batches(rows, lengths, self.tokens, padded=not self.packed)

    def run(
        self, work: Callable[[Iterator[list[int]]], Result], rows: Sequence[int], lengths: Tensor
    ) -> Result:
        """What ``work`` makes of the micro-batches of ``rows``.

        When memory runs out, the engine's is given back, or where there is none the budget halves;
        and ``work`` starts again, from its own beginning.
        Each rank does so by itself: ranks meet where gradients are summed, behind this call, and
        wait there for one that starts again.

        Raises:
            MemoryError: A single row does not fit, or other ranks are in the same pass.
        """
        while True:
            micro, tried = self.cut(rows, lengths), list[list[int]]()
            try:
                with nullcontext() if self._shared is None else in_step(self._shared, len(micro)):
                    return work(_remembering(micro, tried))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self._shared is not None:
                    raise MemoryError(
                        "Out of memory in a pass that other ranks wait in (trainer=fsdp), so it "
                        f"cannot start again. Type micro_batch_tokens={max(1, self.tokens // 2)}"
                    ) from error
                released = self._release()
                single = [len(batch) == 1 for batch in micro]
                if released:
                    log.warning("Out of memory: keys and values are given back before an update")
                elif all(single) or (len(tried) == 1 and single[0]):
                    tokens = int(lengths[micro[0][0]])
                    raise MemoryError(
                        f"Out of memory with a single row of {tokens} tokens: no smaller "
                        f"micro-batch is left. Type max_context={max(1, tokens // 2)} or "
                        "memory=window for shorter rows, policy.gradient_checkpointing=true, or a "
                        "smaller policy=..."
                    ) from error
            # Outside the handler, whose traceback holds on to the tensors of the failed pass.
            if released:
                torch.cuda.empty_cache()
            else:
                self._halve(micro, lengths)

    def _halve(self, micro: list[list[int]], lengths: Tensor) -> None:
        """Halve the budget, or the largest micro-batch of several rows where that is less."""
        sizes = lengths.tolist()
        largest = max(
            sum(sizes[row] for row in batch) if self.packed else sizes[batch[0]] * len(batch)
            for batch in micro
            if len(batch) > 1
        )
        before, self.tokens = self.tokens, max(1, min(self.tokens, largest) // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.warning(
            "Out of memory: the budget of a micro-batch goes from %d to %d tokens, and the pass "
            "starts again. Type micro_batch_tokens=%d to start so next time.",
            before,
            self.tokens,
            self.tokens,
        )


def _remembering(batches: list[list[int]], tried: list[list[int]]) -> Iterator[list[int]]:
    for rows in batches:
        tried.append(rows)
        beat("micro_batch")
        yield rows
        beat("rows", len(rows))
