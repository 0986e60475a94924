"""Every environment of ours through its DataModule, as a user would check one of their own."""

from __future__ import annotations

import pytest
from coin import CoinDataModule

from aem_lightning.datamodules import AlfworldDataModule, WebShopDataModule
from aem_lightning.envs import EnvContractError, check_env


def test_alfworld_keeps_the_contract(alfworld_root):
    check_env(AlfworldDataModule(str(alfworld_root)), tasks_per_split=2)


@pytest.mark.parametrize("shown", [True, False])
def test_webshop_keeps_the_contract(webshop_root, shown):
    """Where the instruction is not shown, goals differ by what the same purchase is worth."""
    datamodule = WebShopDataModule(
        str(webshop_root),
        nouns="given",
        splits={"test": [0, 12], "train": [12, None]},
        evaluation_splits=["test"],
        environment={"show_instruction": shown},
    )
    datamodule.prepare_data()
    check_env(datamodule, tasks_per_split=3)


def test_an_evaluation_task_that_is_a_training_task_by_another_name_is_told():
    """The coin lies in one of four boxes: more tasks than that cannot differ."""
    with pytest.raises(EnvContractError, match=r"'valid_seen/0'.* the start of task 'train/0'"):
        check_env(CoinDataModule(), resets=0)
