"""The settings of an agent: plain numbers, as they stand at the top of the config."""

from __future__ import annotations

from dataclasses import dataclass

from aem_lightning.modules.attention import Packing


@dataclass(frozen=True)
class RolloutSettings:
    """How episodes are played.

    Attributes:
        group_size: Copies of a task, G.
        max_turns: Turns after which an episode is cut.
        max_new_tokens: Tokens of a response.
        max_context: Tokens of prompt and response together.
        temperature: Sampling temperature in training.
        eval_temperature: Sampling temperature in evaluation; 0 is greedy.
        concurrency: Episodes in play at once.
        collection_rounds: With more than 1, uniform groups are replaced by groups of new tasks in
            up to that many rounds (DAPO's dynamic sampling).
        compact_filtering: Trajectories that a limit cut leave the loss (DeepSWE's GRPO++).
        anchor_similarity: How alike two observations are that share an anchor state; 1 is equality.
        overlap_share: Of the responses under way, how many have to finish before environments and
            waiting episodes go on; 1 is a barrier between turns.
    """

    group_size: int = 8
    max_turns: int = 50
    max_new_tokens: int = 512
    max_context: int = 2560
    temperature: float = 1.0
    eval_temperature: float = 0.4
    concurrency: int = 128
    collection_rounds: int = 1
    compact_filtering: bool = False
    anchor_similarity: float = 1.0
    overlap_share: float = 1.0


@dataclass(frozen=True)
class UpdateSettings:
    """How a rollout batch is used.

    Attributes:
        update_epochs: Passes over the rollout batch, K.
        num_minibatches: Optimizer steps a pass: a fixed number, whatever the batch's size.
        micro_batch_tokens: Tokens of one forward and backward pass; a single row may exceed it.
        packing: How rows share a pass: ``packed`` one after the other, ``padded`` to the longest,
            or ``auto``: packed wherever the model allows it and the device has a fast kernel.
        max_grad_norm: Gradient norm to clip at.
    """

    update_epochs: int = 1
    num_minibatches: int = 1
    micro_batch_tokens: int = 16384
    packing: Packing = "auto"
    max_grad_norm: float = 1.0
