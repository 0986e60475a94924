"""Environments as DataModules: which tasks there are, and which environment plays them."""

from typing import TYPE_CHECKING

from aem_lightning.datamodules.agent import AgentDataModule
from aem_lightning.datamodules.seeded import GymnasiumDataModule, SeededDataModule
from aem_lightning.lazy import lazily

if TYPE_CHECKING:
    from aem_lightning.datamodules.alfworld import AlfworldDataModule
    from aem_lightning.datamodules.dataset import (
        DatasetDataModule,
        OwnAgentDataModule,
        ToolsDataModule,
    )
    from aem_lightning.datamodules.swe import SweDataModule
    from aem_lightning.datamodules.testbeds import BaitDataModule, CorridorDataModule
    from aem_lightning.datamodules.webshop import WebShopDataModule

__all__ = [
    "AgentDataModule",
    "AlfworldDataModule",
    "BaitDataModule",
    "CorridorDataModule",
    "DatasetDataModule",
    "GymnasiumDataModule",
    "OwnAgentDataModule",
    "SeededDataModule",
    "SweDataModule",
    "ToolsDataModule",
    "WebShopDataModule",
]
# Imported when asked for: a worker of someone's own environment needs none of their engines.
__getattr__ = lazily(
    __name__,
    {
        "alfworld": ["AlfworldDataModule"],
        "dataset": ["DatasetDataModule", "OwnAgentDataModule", "ToolsDataModule"],
        "testbeds": ["BaitDataModule", "CorridorDataModule"],
        "swe": ["SweDataModule"],
        "webshop": ["WebShopDataModule"],
    },
)
