"""The strategy of ``trainer=fsdp``: Lightning's of FSDP2, with checkpoints as any run has."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.strategies.strategy import Strategy

from aem_lightning.runner.several import SHARDED


class FullySharded(ModelParallelStrategy):
    """Frozen weights shared by the ranks of a machine, adapters whole on each.

    The module's ``configure_model`` shares them out. A checkpoint holds what trains, and rank 0
    writes it alone, also where a signal stops it; a run with another strategy goes on from it.
    """

    lightning_restore_optimizer = True
    optimizer_state = Strategy.optimizer_state
    save_checkpoint = Strategy.save_checkpoint
    load_checkpoint = Strategy.load_checkpoint
    load_model_state_dict = Strategy.load_model_state_dict
    load_optimizer_state_dict = Strategy.load_optimizer_state_dict

    def setup(self, trainer: L.Trainer) -> None:
        """As Lightning does; then there are weights to check, which all ranks do together."""
        from aem_lightning.runner.evaluation import check_agent  # it builds trainers

        super().setup(trainer)
        agent: Any = self.lightning_module
        check_agent(trainer, agent)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What trains; a part of a frozen weight means nothing to anyone else."""
        agent: Any = self.lightning_module
        return {f"policy.{name}": value for name, value in agent.policy.trainable().items()}


StrategyRegistry.register(SHARDED, FullySharded, description="FSDP2, adapters whole on every rank")
