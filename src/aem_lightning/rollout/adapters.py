"""Adapters in the type that a model computes in: cast once, in place of in every product."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from aem_lightning.functional.logprob import HALF


class AdapterCopies:
    """Copies of the LoRA weights of ``model`` in the type ``kind`` of its matrix products.

    The weights themselves stay in float32, for the optimizer. Read from there, every product casts
    them and what goes into them, which is a third of the kernels of a decode step. Where autocast
    would cast, the bits come out the same. The copies stay where they are: graphs hold addresses.
    """

    def __init__(self, model: nn.Module, kind: torch.dtype) -> None:
        self._kind = kind
        self._modules = [
            module
            for name, module in model.named_modules()
            if name.split(".")[-2:-1] in (["lora_A"], ["lora_B"])
            and isinstance(module, nn.Linear)
            and kind in HALF
            and module.weight.dtype == torch.float32
        ]
        self._copies: list[nn.Parameter] = []

    def refresh(self) -> None:
        """Take the present weights."""
        with torch.inference_mode(False), torch.no_grad():
            weights = [module.weight.detach() for module in self._modules]
            if not self._copies:
                cast = [weight.to(self._kind) for weight in weights]
                self._copies = [nn.Parameter(copy, requires_grad=False) for copy in cast]
            for copy, weight in zip(self._copies, weights, strict=True):
                copy.copy_(weight)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model computes with the copies."""
        if not self._copies:
            self.refresh()
        weights = [module.weight for module in self._modules]
        try:
            for module, copy in zip(self._modules, self._copies, strict=True):
                module.weight = copy
            yield
        finally:
            for module, weight in zip(self._modules, weights, strict=True):
                module.weight = weight
