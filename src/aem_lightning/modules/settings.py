"""The settings of an agent and its policy: plain values, as they stand in the config.

Their annotations are what a config is held against, before torch is imported: nothing heavy here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AllowInfNan

from aem_lightning.types import AnchorBy, Count, NonNegative, Places, Positive, Seed, Share

Packing = Literal["auto", "packed", "padded"]


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
        filter: ``variance`` trains on the groups whose returns vary most, the fewest that hold
            ``filter_share`` of the sum of their standard deviations (RAGEN-2, arXiv 2604.06268);
            ``None`` on all that there are.
        filter_share: See ``filter``.
        compact_filtering: Trajectories that a limit cut leave the loss (DeepSWE's GRPO++).
        anchor_similarity: How alike two observations are that share an anchor state; 1 is equality.
        anchor_by: What tells anchor states apart: the ``observation``, or ``admissible_actions``,
            where equal observations hide unlike states.
        overlap_share: Of the responses under way, how many have to finish before environments and
            waiting episodes go on; 1 is a barrier between turns.
    """

    group_size: Count = 8
    max_turns: Count = 50
    max_new_tokens: Count = 512
    max_context: Count = 2560
    temperature: Positive = 1.0
    eval_temperature: NonNegative = 0.4
    concurrency: Places = 128
    collection_rounds: Count = 1
    filter: Literal["variance"] | None = None
    filter_share: Share = 0.9
    compact_filtering: bool = False
    anchor_similarity: Annotated[float, Gt(0), Le(1)] = 1.0
    anchor_by: AnchorBy = "observation"
    overlap_share: Share = 1.0


@dataclass(frozen=True)
class Asynchrony:
    """Whether rollouts are played beside updates.

    Attributes:
        lag: Iterations that a rollout may be ahead: with 1 it is played by the policy as it was
            before the last update, while that is made.
    """

    lag: Literal[0, 1] = 0


@dataclass(frozen=True)
class UpdateSettings:
    """How a rollout batch is used.

    Attributes:
        update_epochs: Passes over the rollout batch, K.
        num_minibatches: Optimizer steps a pass: a fixed number, whatever the batch's size.
        micro_batch_tokens: Tokens of one forward and backward pass; a single row may exceed it.
        packing: How rows share a pass: ``packed`` one after the other, ``padded`` to the longest,
            or ``auto``: packed wherever the model allows it and the device has a fast kernel.
        max_grad_norm: Gradient norm to clip at; ``inf`` does not clip.
    """

    update_epochs: Count = 1
    num_minibatches: Count = 1
    micro_batch_tokens: Count = 16384
    packing: Packing = "auto"
    max_grad_norm: Annotated[float, Gt(0), AllowInfNan()] = 1.0


@dataclass(frozen=True)
class Lora:
    """LoRA settings.

    ``dropout`` stays 0: with it, sampling and training would be different policies.
    Source: arXiv 2106.09685.
    """

    r: Count = 32
    alpha: Count = 64
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    target_modules: str | Sequence[str] = "all-linear"


@dataclass(frozen=True)
class Architecture:
    """The shape of a tiny model; the names are Qwen2Config's.

    A wider start (``initializer_range``) and a shorter rotary base than Qwen2's own let a small
    model learn to copy names from its prompt within a few hundred updates.
    """

    hidden_size: Count = 128
    intermediate_size: Count = 384
    num_hidden_layers: Count = 3
    num_attention_heads: Count = 4
    num_key_value_heads: Count = 2
    max_position_embeddings: Count = 4096
    initializer_range: Positive = 0.05
    rope_theta: Positive = 1000.0

    def __post_init__(self) -> None:
        for name in ("initializer_range", "rope_theta"):  # Qwen2Config takes no int for a float
            object.__setattr__(self, name, float(getattr(self, name)))


@dataclass(frozen=True)
class WarmStartSettings:
    """How a policy learns from expert play.

    Attributes:
        required: The policy is made by this stage; it has no other weights.
        base: The hub name or folder of the model that such a policy is made from; ``None`` makes it
            from nothing but its architecture.
        demonstrations: Expert episodes to play.
        demonstrations_from: A folder or file of recorded chats, in the place of expert play.
        max_turns: Turns of a demonstration; ``None`` allows as many as the run does.
        slip: Share of random actions in them, from which the expert has to recover.
        imitate_slips: Learn the random actions too, as from a careless player; reinforcement can
            then unlearn them.
        imitate_losses: Learn from lost episodes too, as from a player who is no expert.
        epochs: Passes over them.
        lr: Peak learning rate.
        prompt_weight: Weight of a prompt token in the loss; a response token has 1.
        batch_tokens: Padded tokens of one batch.
        max_grad_norm: Gradient norm to clip at.
        seed: Key of the demonstrations and of the initial weights.
    """

    required: bool = False
    base: str | None = None
    demonstrations: Count = 1000
    demonstrations_from: str | None = None
    max_turns: Count | None = None
    slip: Share = 0.0
    imitate_slips: bool = False
    imitate_losses: bool = False
    epochs: Count = 3
    lr: Positive = 1e-3
    prompt_weight: NonNegative = 0.0
    batch_tokens: Count = 8192
    max_grad_norm: Positive = 1.0
    seed: Seed = 0
