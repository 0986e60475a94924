"""Lightning modules and the policy they train; each is imported when it is first asked for.

So a program without a trainer, as `examples/loop.py` is, takes the policy and no Lightning.
"""

import logging
from typing import TYPE_CHECKING

from aem_lightning.lazy import lazily

if TYPE_CHECKING:
    from aem_lightning.modules.agent import AgentModule
    from aem_lightning.modules.journal import RolloutJournal
    from aem_lightning.modules.policy import Policy, check_dtype, uses_gpu
    from aem_lightning.modules.settings import (
        Architecture,
        Lora,
        RolloutSettings,
        UpdateSettings,
        WarmStartSettings,
    )
    from aem_lightning.modules.tiny import build_tiny_model, build_tokenizer
    from aem_lightning.modules.warm_start import (
        DemonstrationSampler,
        WarmStartModule,
        collate_demonstrations,
        demonstrations_dataset,
    )

# peft imports bitsandbytes, which then reports a kernel package that it would like on a CPU.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__all__ = [
    "AgentModule",
    "Architecture",
    "DemonstrationSampler",
    "Lora",
    "Policy",
    "RolloutJournal",
    "RolloutSettings",
    "UpdateSettings",
    "WarmStartModule",
    "WarmStartSettings",
    "build_tiny_model",
    "build_tokenizer",
    "check_dtype",
    "collate_demonstrations",
    "demonstrations_dataset",
    "uses_gpu",
]

__getattr__ = lazily(
    __name__,
    {
        "agent": ["AgentModule"],
        "journal": ["RolloutJournal"],
        "policy": ["Policy", "check_dtype", "uses_gpu"],
        "settings": [
            "Architecture",
            "Lora",
            "RolloutSettings",
            "UpdateSettings",
            "WarmStartSettings",
        ],
        "tiny": ["build_tiny_model", "build_tokenizer"],
        "warm_start": [
            "DemonstrationSampler",
            "WarmStartModule",
            "collate_demonstrations",
            "demonstrations_dataset",
        ],
    },
)
