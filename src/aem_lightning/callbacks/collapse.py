"""Template collapse: responses that no longer depend on what they answer."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from aem_lightning.callbacks.loggers import log_scalars
from aem_lightning.callbacks.outputs import iteration_of
from aem_lightning.types import Iteration


class TemplateCollapse(Callback):
    """How much first responses say about the prompts that they answer.

    Every ``every`` iterations the first responses to ``prompts`` tasks are scored under each
    other's prompts, with the weights after the update. It logs ``collapse/mutual_information``
    (nats; log of the number of prompts at most, 0 where responses are alike whatever was asked) and
    ``collapse/retrieval_accuracy``, the share whose own prompt makes them most likely. Entropy
    does not show this collapse: each response may be as random as ever. Source: RAGEN-2, arXiv
    2604.06268. With several ranks the episodes are those of rank zero.

    Args:
        prompts: N, whose squared number of rows is scored.
        every: Iterations between two looks.
    """

    def __init__(self, prompts: int = 8, every: int = 10) -> None:
        if prompts < 2 or every < 1:
            raise ValueError(f"prompts={prompts}, every={every}: type a number >= 2, and one >= 1")
        self._prompts, self._every = prompts, every

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, *_: Any
    ) -> None:
        """Look at the iteration that ended, where it is its turn."""
        iteration = iteration_of(outputs)
        if iteration is None or iteration.index % self._every:
            return
        pairs = first_turns(iteration, self._prompts)
        if len(pairs) > 1:
            table = cross_scores(pl_module, pairs)
            log_scalars(trainer, collapse_statistics(table), step=iteration.index)


def first_turns(iteration: Iteration, count: int) -> list[tuple[list[int], list[int]]]:
    """Prompt and response ids of the first turns of ``count`` groups, with unlike prompts."""
    found: dict[tuple[int, ...], list[int]] = {}
    for trajectory in iteration.trajectories:
        if len(found) < count and trajectory.copy == 0 and trajectory.turns:
            turn = trajectory.turns[0]
            row, end = trajectory.rows[turn.row], turn.start + turn.length
            found.setdefault(tuple(row[: turn.start]), row[turn.start : end])
    return [([*prompt], response) for prompt, response in found.items() if response]


@torch.no_grad()
def cross_scores(module: Any, pairs: list[tuple[list[int], list[int]]]) -> Tensor:
    """Log-probability of each response (rows) under each prompt (columns), [N, N], nats."""
    table = torch.zeros(len(pairs), len(pairs))
    for i, (_, response) in enumerate(pairs):
        rows = [prompt + response for prompt, _ in pairs]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=module.device)
        starts = torch.tensor([len(prompt) for prompt, _ in pairs], device=module.device)[:, None]
        places = torch.arange(width, device=module.device)
        mask = (places >= starts) & (places < starts + len(response))
        logprobs, _ = module.policy.score(ids, mask, module.rollout.temperature)
        table[i] = logprobs.view(len(pairs), -1).sum(dim=1).float().cpu()
    return table


def collapse_statistics(table: Tensor) -> dict[str, float]:
    """Mutual information and retrieval accuracy of log p(response i | prompt j), [N, N].

    ``MI = mean_i[log p(z_i | x_i) - (logsumexp_j log p(z_i | x_j) - log N)]``.

    Example:
        >>> collapse_statistics(torch.zeros(2, 2))["collapse/mutual_information"]
        0.0
    """
    own = table.diagonal()
    marginal = table.logsumexp(dim=1) - math.log(len(table))
    right = table.argmax(dim=1) == torch.arange(len(table))
    return {
        "collapse/mutual_information": float((own - marginal).mean()),
        "collapse/retrieval_accuracy": float(right.float().mean()),
    }
