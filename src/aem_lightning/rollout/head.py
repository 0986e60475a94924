"""The head of a causal LM: from last hidden states to logits, as the model itself computes them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aem_lightning.functional.logprob import wide_product

_PROBE = 100.0  # large: a soft cap changes large logits first


class Head:
    """What comes after the decoder of ``causal_lm``: bias, scale, soft cap and all.

    Most heads are one product, which can be computed with little memory (``weight``). Any other is
    the model's own forward pass, in which given hidden states stand in for its decoder's.

    Args:
        causal_lm: A ``*ForCausalLM`` of transformers, adapters injected or not; no PEFT wrapper.

    Attributes:
        decoder: The model below.
    """

    def __init__(self, causal_lm: Any) -> None:
        self._model = causal_lm
        self.decoder = decoder_of(causal_lm)
        self._is_product: bool | None = None

    @property
    def weight(self) -> Tensor | None:
        """[V, d] where the logits are ``hidden @ weight.T`` and nothing else, else ``None``.

        Measured once, on the model: no list of families or of names in configs could be complete.
        """
        if self._is_product is None:
            self._is_product = self._measure()
        weight: Tensor = self._model.get_output_embeddings().weight
        return weight if self._is_product else None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [T, V] of last hidden states [T, d]; those of a product in float32 or wider.

        Raises:
            ValueError: The model does not call what it names as its decoder.
        """
        if (weight := self.weight) is not None:
            return wide_product(hidden, weight)
        return self._own(hidden)

    def _own(self, hidden: Tensor) -> Tensor:
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        with _standing_in(self.decoder, hidden[None]) as calls:
            logits: Tensor = self._model(input_ids=ids, use_cache=False).logits
        if calls != [1]:
            raise ValueError(
                f"{type(self._model).__name__} does not compute its logits from one pass of "
                f"{type(self.decoder).__name__}: type another policy.model=..."
            )
        return logits[0]

    def _measure(self) -> bool:
        head = self._model.get_output_embeddings()
        if type(head) is not nn.Linear:  # none, quantised, or with an adapter
            return False
        inside = {id(parameter) for parameter in self.decoder.parameters()}
        outside = {id(parameter) for parameter in self._model.parameters()} - inside
        if outside - {id(head.weight)}:  # a bias, or a scale that is learned
            return False
        device, kind = head.weight.device, head.weight.dtype
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(2, head.in_features, generator=generator).mul_(_PROBE).to(device, kind)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            own, product = self._own(probe), nn.functional.linear(probe[None], head.weight)[0]
        return torch.allclose(own.float(), product.float(), rtol=0.0, atol=0.0, equal_nan=True)


def decoder_of(causal_lm: Any) -> Any:
    """The model below the head of ``causal_lm``: token ids in, last hidden states out.

    Raises:
        ValueError: There is none, or more than one that could be it.
    """
    # Both go by names of attributes, which some families give to other parts.
    for named in (causal_lm.get_decoder(), causal_lm.base_model):
        if named is not causal_lm and hasattr(named, "config"):
            # A model with eyes may hold a whole causal LM.
            return decoder_of(named) if hasattr(named, "lm_head") else named
    found = [child for child in causal_lm.children() if hasattr(child, "config")]
    if len(found) != 1:
        raise ValueError(
            f"{type(causal_lm).__name__} has {len(found)} parts that could be its decoder: type "
            "another policy.model=..."
        )
    return found[0]


def widest_window(config: Any) -> int:
    """Tokens that the layers of a decoder with windows or chunks see at most; 0 without any."""
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return max((window for window in windows if isinstance(window, int)), default=0)


def probe_rows(causal_lm: Any, count: int, longest: int) -> list[list[int]]:
    """Rows of token ids for a trial of ``causal_lm``, each one shorter than the one before.

    They go past its window where that is short, and are never longer than ``longest``.
    """
    length = min(longest, 8 + min(widest_window(decoder_of(causal_lm).config), 64))
    vocabulary = causal_lm.get_input_embeddings().weight.shape[0]
    return [
        [(5 + 7 * i + 3 * row) % 251 % vocabulary for i in range(length - row)]
        for row in range(count)
    ]


@contextmanager
def _standing_in(decoder: Any, hidden: Tensor) -> Iterator[list[int]]:
    """``decoder`` returns ``hidden`` [1, T, d] inside; yields how often it was asked, in a list."""
    calls = [0]

    def forward(*args: object, **kwargs: object) -> Any:
        calls[0] += 1
        return _output_class()(last_hidden_state=hidden)

    had = decoder.__dict__.get("forward")  # accelerate's hooks put one there
    decoder.forward = forward
    try:
        yield calls
    finally:
        if had is None:
            del decoder.forward
        else:
            decoder.forward = had


@functools.cache
def _output_class() -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPast  # heavy

    @dataclass
    class Given(BaseModelOutputWithPast):
        """Hidden states alone; whatever else a family reads of its decoder is ``None``."""

        def __getattr__(self, name: str) -> None:
            if name.startswith("__"):
                raise AttributeError(name)

    return Given
