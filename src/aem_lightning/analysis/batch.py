"""A batch that a run could not compute with: stage by stage, up to what is not finite."""

from __future__ import annotations

import logging
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from aem_lightning.modules import AgentModule
from aem_lightning.modules.batching import choose_tokens, trained_units
from aem_lightning.modules.finite import FiniteCheck, check_weights
from aem_lightning.modules.scoring import Objective, fill_values
from aem_lightning.modules.update import accumulate_gradients
from aem_lightning.runner.build import build_agent, build_datamodule, build_policy
from aem_lightning.types import RolloutBatch, Task, Trajectory

log = logging.getLogger(__name__)


def batch(cfg: DictConfig) -> None:
    """Compute on the batch and the weights that ``cfg.file`` holds.

    Raises:
        NotFiniteError: As in the run.
    """
    stored = torch.load(cfg.file, map_location="cpu", weights_only=True)
    log.info("In the run: %s", stored["said"])
    trained = OmegaConf.create(stored["config"])
    datamodule = build_datamodule(trained)
    try:
        policy, _ = build_policy(trained, datamodule)
        module = build_agent(trained, policy, datamodule)
    finally:
        datamodule.close()
    policy.load_state_dict(stored["weights"], strict=False)
    compute(module, stored["iteration"], stored["kept"])
    log.info("Every number is finite here, on this machine")


def compute(module: AgentModule, iteration: int, kept: dict[str, Any]) -> None:
    """The stages of an iteration that ``kept`` allows, with the weights that ``module`` has."""
    policy, temperature = module.policy, module.rollout.temperature
    check_weights(iteration, policy)
    if "returns" not in kept:
        ids = kept.get("input_ids")
        if ids is not None:  # of a prompt whose next token had no finite logits
            mask = torch.ones_like(ids, dtype=torch.bool)
            mask[:, 0] = False
            logprobs, _ = policy.score(ids, mask, temperature)
            log.info("Log-probabilities of prompt and response: %s", logprobs.tolist())
        return
    episodes = [Trajectory(Task(task), group, copy) for task, group, copy in kept["episodes"]]
    known = RolloutBatch.__dataclass_fields__
    given = {name: value for name, value in kept.items() if name in known}
    played = RolloutBatch(**{"ref_logprobs": None, **given})
    finite = FiniteCheck(iteration, episodes, played)
    if module.critic is not None:
        fill_values(policy, played, module.critic, module.budget)
    advantages = module.estimator(played)
    modulated = module.modulation(played)
    scaled = modulated.apply(advantages, played)
    finite.look(advantages, modulated.alpha, scaled)
    objective = Objective(
        policy,
        played,
        scaled,
        module.loss,
        temperature,
        on_policy=False,
        packed=module.budget.packed,
        chosen=choose_tokens(module.covariance, played, scaled, module.seed),
        critic=module.critic,
    )
    rows = kept.get("rows") or list(range(len(played.input_ids)))
    check = finite.of_update(objective, rows, module.budget.cut)
    units = trained_units(played, module.loss.aggregation).sum().clamp(min=1)
    micro = module.budget.cut(rows, played.row_length)
    accumulate_gradients(objective, micro, units, check)
    check("gradient norm", torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0))
