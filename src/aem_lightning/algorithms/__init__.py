"""Estimators, modulations and losses: thin settings over `aem_lightning.functional`."""

from aem_lightning.algorithms.entropy_control import (
    AdaptiveEntropy,
    ClipCov,
    CovarianceControl,
    KLCov,
)
from aem_lightning.algorithms.estimators import (
    GRPO,
    RLOO,
    Estimator,
    GiGPO,
    Overlong,
    ReinforcePP,
    check_group_size,
    response_means,
)
from aem_lightning.algorithms.losses import (
    ClippedLoss,
    ImportanceCorrection,
    Loss,
    LossTerms,
    TokenColumns,
)
from aem_lightning.algorithms.modulations import (
    AEM,
    EMPG,
    Modulated,
    Modulation,
    NoModulation,
    Stacked,
)
from aem_lightning.algorithms.ppo import PPO

__all__ = [
    "AEM",
    "EMPG",
    "GRPO",
    "PPO",
    "RLOO",
    "AdaptiveEntropy",
    "ClipCov",
    "ClippedLoss",
    "CovarianceControl",
    "Estimator",
    "GiGPO",
    "ImportanceCorrection",
    "KLCov",
    "Loss",
    "LossTerms",
    "Modulated",
    "Modulation",
    "NoModulation",
    "Overlong",
    "ReinforcePP",
    "Stacked",
    "TokenColumns",
    "check_group_size",
    "response_means",
]
