"""How many bytes a policy takes, by arithmetic, before any of them is allocated.

Weights, adapters, gradients and optimizer states are exact. What an update keeps for its backward
pass is an estimate: kernels of different devices keep different things. Keys and values are
`aem_lightning.rollout.slot_cache.bytes_of_token`'s, where they are allocated.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from aem_lightning.functional.logprob import CHUNK
from aem_lightning.modules.policy import Policy
from aem_lightning.modules.settings import Lora
from aem_lightning.rollout.slot_cache import bytes_of_token

# nf4 with its scales quantised once more: four bits, a byte for 64 of them, a float32 for 256 such.
FOUR_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)
_UNIFORM = ("llama", "mistral", "qwen2", "qwen3")  # one layer has the weights that another has
_LOGITS = 3  # [CHUNK, V] in float32 at once: logits, their gradient, an intermediate one


@dataclass(frozen=True)
class Footprint:
    """What the memory of a policy goes by.

    Attributes:
        weights: Bytes of what is frozen.
        trained: Numbers of each tensor that trains, in float32.
        config: Of its decoder, as transformers has it.
        vocabulary: Its size.
        kind: What products are computed in.
    """

    weights: int
    trained: tuple[int, ...]
    config: Any
    vocabulary: int
    kind: torch.dtype

    @classmethod
    def of(cls, policy: Policy, kind: torch.dtype, *, four_bits: bool = False) -> Footprint:
        """That of a policy which is there, if only on torch's meta device."""
        model: Any = policy.causal_lm
        frozen: dict[Tensor, float] = {
            p: p.nbytes for p in policy.parameters() if not p.requires_grad
        }
        head = model.get_output_embeddings()
        for module in model.modules() if four_bits else ():
            if isinstance(module, nn.Linear) and module is not head and module.weight in frozen:
                frozen[module.weight] = module.weight.numel() * FOUR_BITS
        trained = tuple(p.numel() for p in policy.trainable().values())
        vocabulary = len(model.get_input_embeddings().weight)
        return cls(int(sum(frozen.values())), trained, policy.head.decoder.config, vocabulary, kind)

    @classmethod
    def before_loading(
        cls, config: Any, lora: Lora | None, stored: torch.dtype, kind: torch.dtype, **options: bool
    ) -> Footprint:
        """That of a model of which nothing but its ``config`` has been read."""

        def cut(layers: int) -> Footprint:
            shorter = copy.deepcopy(config)
            shorter.num_hidden_layers = layers
            if getattr(shorter, "layer_types", None):
                shorter.layer_types = shorter.layer_types[:layers]
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                model = AutoModelForCausalLM.from_config(shorter, dtype=stored)
                nobody: Any = None  # nothing is written
                return cls.of(Policy(model, nobody, lora), kind, **options)

        if config.model_type not in _UNIFORM:
            return cut(config.num_hidden_layers)
        one, two = cut(1), cut(2)
        more = config.num_hidden_layers - 1
        weights = one.weights + more * (two.weights - one.weights)
        trained = [*one.trained]
        trained += [*(Counter(two.trained) - Counter(one.trained)).elements()] * more
        return cls(weights, tuple(trained), config, one.vocabulary, kind)

    @property
    def adapters(self) -> int:
        """Bytes of what trains."""
        return 4 * sum(self.trained)

    def key_values(self, slots: int, length: int) -> int:
        """Bytes of the keys and values of so many episodes of that length, at most."""
        return slots * length * bytes_of_token(self.config, self.kind)

    def layer(self) -> int:
        """About what a token leaves in a layer for its backward pass, adapters included."""
        config = self.config
        wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        wide = max(wide) if isinstance(wide, list | tuple) else wide
        heads = bytes_of_token(config, torch.int8) // int(config.num_hidden_layers)
        return int(self.kind.itemsize) * (14 * int(config.hidden_size) + 5 * int(wide) + 4 * heads)

    def activations(self, tokens: int, *, checkpointed: bool) -> int:
        """What so many tokens of a micro-batch keep for the backward pass."""
        layers, config = int(self.config.num_hidden_layers), self.config
        inputs = layers * int(config.hidden_size) * self.kind.itemsize if checkpointed else 0
        return tokens * (inputs + self.layer() * (1 if checkpointed else layers))

    def head(self, tokens: int) -> int:
        """Logits of the chunk under way, and what is made of them."""
        return _LOGITS * 4 * min(tokens, CHUNK) * self.vocabulary

    def graphs(self, slots: int) -> int:
        """Logits of captured decode steps, and the pool that their graphs share."""
        return 2 * 4 * slots * self.vocabulary


def optimizer_bytes(
    make: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer], trained: Iterable[int]
) -> int:
    """Bytes of the states of an optimizer, by what one step leaves of a small tensor."""
    small = nn.Parameter(torch.zeros(2, 3))
    small.grad = torch.zeros_like(small)
    optimizer = make([small])
    optimizer.step()
    states = [value for value in optimizer.state[small].values() if torch.is_tensor(value)]
    each = sum(value.nbytes for value in states if value.shape == small.shape) / small.numel()
    once = sum(value.nbytes for value in states if value.shape != small.shape)
    return int(sum(each * numbers + once for numbers in trained))
