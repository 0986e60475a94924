"""Estimators, modulations and losses: thin settings over `aem_lightning.functional`."""

from aem_lightning.algorithms.estimators import GRPO, Estimator
from aem_lightning.algorithms.losses import ClippedLoss
from aem_lightning.algorithms.modulations import AEM, Modulation, NoModulation

__all__ = ["AEM", "GRPO", "ClippedLoss", "Estimator", "Modulation", "NoModulation"]
