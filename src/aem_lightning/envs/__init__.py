"""Environments: the text protocol, its check, and the pool of worker processes.

Imports neither torch nor lightning, so that workers start light.
"""

from aem_lightning.envs.base import (
    RESERVED_INFO_KEYS,
    EnvContractError,
    EnvPoolError,
    MissingExtraError,
    TextEnv,
)
from aem_lightning.envs.check import check_env
from aem_lightning.envs.pool import EnvPool
from aem_lightning.envs.process import in_worker
from aem_lightning.types import ResetRequest

__all__ = [
    "RESERVED_INFO_KEYS",
    "EnvContractError",
    "EnvPool",
    "EnvPoolError",
    "MissingExtraError",
    "ResetRequest",
    "TextEnv",
    "check_env",
    "in_worker",
]
