"""Lightning modules and the policy they train."""

from aem_lightning.modules.agent import AgentModule
from aem_lightning.modules.policy import Lora, Policy, check_dtype
from aem_lightning.modules.settings import RolloutSettings, UpdateSettings
from aem_lightning.modules.tiny import Architecture, build_tiny_model, build_tokenizer
from aem_lightning.modules.warm_start import (
    DemonstrationSampler,
    WarmStartModule,
    collate_demonstrations,
    demonstrations_dataset,
)

__all__ = [
    "AgentModule",
    "Architecture",
    "DemonstrationSampler",
    "Lora",
    "Policy",
    "RolloutSettings",
    "UpdateSettings",
    "WarmStartModule",
    "build_tiny_model",
    "build_tokenizer",
    "check_dtype",
    "collate_demonstrations",
    "demonstrations_dataset",
]
