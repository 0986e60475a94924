"""The settings of an agent: plain numbers, as they stand at the top of the config."""

from __future__ import annotations

from dataclasses import dataclass


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
    overlap_share: float = 1.0


@dataclass(frozen=True)
class UpdateSettings:
    """How a rollout batch is used.

    Attributes:
        update_epochs: Passes over the rollout batch, K.
        num_minibatches: Optimizer steps a pass: a fixed number, whatever the batch's size.
        micro_batch_tokens: Padded tokens of one forward and backward pass.
        max_grad_norm: Gradient norm to clip at.
    """

    update_epochs: int = 1
    num_minibatches: int = 1
    micro_batch_tokens: int = 16384
    max_grad_norm: float = 1.0
