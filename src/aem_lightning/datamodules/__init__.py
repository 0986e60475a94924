"""Environments as DataModules: which tasks there are, and which environment plays them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from aem_lightning.datamodules.agent import AgentDataModule
from aem_lightning.datamodules.seeded import GymnasiumDataModule, SeededDataModule

if TYPE_CHECKING:
    from aem_lightning.datamodules.alfworld import AlfworldDataModule
    from aem_lightning.datamodules.swe import SweDataModule
    from aem_lightning.datamodules.webshop import WebShopDataModule

__all__ = [
    "AgentDataModule",
    "AlfworldDataModule",
    "GymnasiumDataModule",
    "SeededDataModule",
    "SweDataModule",
    "WebShopDataModule",
]
# Imported when asked for: a worker of someone's own environment needs none of their engines.
_LATE = {"AlfworldDataModule": "alfworld", "SweDataModule": "swe", "WebShopDataModule": "webshop"}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATE[name]}"), name)
