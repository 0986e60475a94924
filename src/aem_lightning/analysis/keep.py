"""The masks of analysis B: one side of AEM's effect at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from aem_lightning.algorithms import Modulation
from aem_lightning.algorithms.modulations import Modulated
from aem_lightning.types import RolloutBatch

SIGNS = {"positive": 1, "negative": -1}


@dataclass(frozen=True)
class Keep:
    """A modulation that trains only on the responses where A(α−1) has one sign; others get 0.

    A response is kept by the inner modulation's α and the base advantage A, and keeps α·A. Source:
    arXiv 2605.00425, the analysis of masks.

    Attributes:
        modulation: Whose α decides, e.g. `AEM`.
        sign: ``positive`` or ``negative``.
    """

    keeps_zeros: ClassVar[bool] = True

    modulation: Modulation
    sign: Literal["positive", "negative"]

    def __post_init__(self) -> None:
        if self.sign not in SIGNS:
            raise ValueError(
                f"modulation.sign={self.sign!r} is unknown; allowed: {', '.join(SIGNS)}."
            )

    def __call__(self, batch: RolloutBatch) -> Modulated:
        inner = self.modulation(batch)

        def change(advantages: Tensor) -> Tensor:
            kept = SIGNS[self.sign] * advantages * (inner.alpha - 1) > 0
            changed = inner.apply(advantages, batch)
            return torch.where(kept, changed, torch.zeros_like(changed))

        return Modulated(inner.alpha, inner.gated, change)
