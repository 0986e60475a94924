"""Parts of an algorithm in a package of its own: advantage=quantile modulation=linear."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from aem_lightning.algorithms import Modulated


@dataclass(frozen=True)
class QuantileBaseline:
    """Advantages against a quantile of the group: A_i = R_i - Q_q(returns of i's group).

    Q_q is the lower empirical quantile, itself one of the returns: where a group fails more often
    than q, wins alone have an advantage, and where it fails less often, failures alone. The
    baseline is that of QAE, arXiv 2509.22611. A trajectory that is not judged has A = 0.
    """

    quantile: float = 0.5
    min_group_size: int = 2

    def __post_init__(self):
        if not 0 <= self.quantile <= 1:
            raise ValueError(f"advantage.quantile={self.quantile}: type a number in [0, 1]")

    def __call__(self, batch):
        advantages = torch.zeros_like(batch.returns)  # [N]
        for group in batch.group[batch.judged].unique():
            mine = batch.judged & (batch.group == group)
            returns = batch.returns[mine]
            baseline = returns.quantile(self.quantile, interpolation="lower")
            advantages[mine] = returns - baseline
        return advantages[batch.trajectory]  # [R]


@dataclass(frozen=True)
class LinearModulation:
    """AEM to first order: alpha = 1 + slope * (mean(H) - H) / (max(H) - min(H)) within a group.

    H is the mean token entropy of a response. The mean of alpha over a group is 1, and with a slope
    of at most 1 no alpha is negative. A group whose range is not above min_range has alpha = 1.
    """

    keeps_zeros: ClassVar[bool] = True
    slope: float = 0.5
    min_range: float = 0.1

    def __call__(self, batch):
        alpha, gated = torch.ones_like(batch.entropy), []  # [R]
        counted = batch.response_mask & (batch.length > 0)
        for group in batch.response_group[counted].unique():
            mine = counted & (batch.response_group == group)
            entropy = batch.entropy[mine]
            width = entropy.max() - entropy.min()
            gated.append(bool(width <= self.min_range))
            if not gated[-1]:
                alpha[mine] += self.slope * (entropy.mean() - entropy) / width
        return Modulated(alpha, sum(gated) / max(1, len(gated)))
