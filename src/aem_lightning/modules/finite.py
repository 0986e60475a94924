"""NaN and infinity in an iteration: which tensor, whose response, and what fits the cause."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from aem_lightning.modules.policy import Policy
from aem_lightning.modules.scoring import Objective
from aem_lightning.rollout import NotFiniteError, place_of
from aem_lightning.types import RolloutBatch, Trajectory

LARGE_ADVANTAGE = 1e6
LARGE_COEFFICIENT = 1e4
FAR = 20.0  # nats between old and new log-probability: a ratio of e^20

# Stage and advice of each tensor, in the order in which one follows from another.
_REWARD = (
    "reward",
    "it is what the environment and rewards=... gave. python train.py ... stage=check looks at the "
    "environment; rewards.environment=0 leaves its own reward out",
)
_SCORE = (
    "score",
    "the engine's log-probabilities are finite, and the trainer's are not: half precision "
    "overflows. Type trainer.precision=32-true, or policy.dtype=float32",
)
_MODULATION = (
    "modulation",
    "advantages and entropies are finite: type a smaller modulation.sharpness=..., or "
    "modulation=none",
)
_STAGES = {
    "reward": _REWARD,
    "returns": _REWARD,
    "advantage": (
        "advantage",
        "the returns are finite, and what advantage=... makes of them is not: type smaller rewards "
        "(rewards.success=..., rewards.environment=...)",
    ),
    "values": _SCORE,
    "old_logprobs": _SCORE,
    "ref_logprobs": _SCORE,
    "entropies": _SCORE,
    "alpha": _MODULATION,
    "modulated advantage": _MODULATION,
}

_NO_UPDATE = (
    "every update of this run left finite weights, so none did it: the model or a checkpoint came "
    "so, or a callback wrote it"
)


@dataclass(frozen=True)
class FiniteCheck:
    """Names what is not finite in one iteration; its rewards are looked at when it is made.

    Attributes:
        iteration: Its number.
        trajectories: Whose responses the batch holds.
        batch: The rollout batch.

    Raises:
        NotFiniteError: A reward or return is not.
    """

    iteration: int
    trajectories: Sequence[Trajectory]
    batch: RolloutBatch

    def __post_init__(self) -> None:
        self._look({"reward": self.batch.reward, "returns": self.batch.returns})

    def look(self, advantages: Tensor, alpha: Tensor, scaled: Tensor) -> None:
        """Look at advantages [R] (PPO: [S, L]), scores, alpha [R] and modulated advantages.

        Raises:
            NotFiniteError: Naming the first of them that is not finite, and its response.
        """
        scores = {name: getattr(self.batch, name) for name in _STAGES if hasattr(self.batch, name)}
        found = {**scores, "advantage": advantages, "alpha": alpha, "modulated advantage": scaled}
        self._look({name: found[name] for name in _STAGES if found.get(name) is not None})

    def _look(self, tensors: Mapping[str, Tensor]) -> None:
        broken = {name: self._broken(name, values) for name, values in tensors.items()}
        if not torch.stack([bad.any() for bad in broken.values()]).any():  # one wait for the device
            return
        name = next(name for name, bad in broken.items() if bad.any())
        at, values = tuple(broken[name].nonzero()[0]), tensors[name]
        where = int(at[0]) if len(at) == 1 else int(self.batch.response_index[at])
        said = f"The {name} of iteration {self.iteration} is {float(values[at])}"
        stage, advice = _STAGES[name]
        response, trajectory = (None, where) if name == "returns" else (where, None)
        self._refuse(
            said,
            stage,
            advice,
            tensor=name,
            response=response,
            trajectory=trajectory,
            kept={name: values.detach()},
        )

    def of_update(
        self, objective: Objective, rows: Sequence[int], cut: Callable[..., list[list[int]]]
    ) -> Callable[[str, Tensor], None]:
        """A check of scalars of an optimizer step over ``rows``; ``cut`` makes micro-batches."""

        def check(name: str, value: Tensor) -> None:
            if torch.isfinite(value):
                return
            is_broken = _loss_is_broken if name == "loss" else _gradient_is_broken
            response = None
            if not objective.policy.sharded:  # else the others would have to look with this rank
                response = first_broken(objective, rows, cut, is_broken)
            self._refuse(
                f"The {name} of iteration {self.iteration} is {float(value.detach())}",
                "update",
                f"{cause(objective, response)}. The weights are those of the last update",
                tensor=name,
                response=response,
                kept={"rows": list(rows)},
            )

        return check

    def _refuse(
        self,
        said: str,
        stage: str,
        advice: str,
        *,
        tensor: str,
        response: int | None = None,
        trajectory: int | None = None,
        kept: Mapping[str, Any] | None = None,
    ) -> None:
        turn = None
        if response is not None:
            trajectory = int(self.batch.trajectory[response])
            turn = int(self.batch.turn[response])
        raise NotFiniteError(
            said,
            stage=stage,
            tensor=tensor,
            place="" if trajectory is None else place_of(self.trajectories[trajectory], turn),
            advice=advice,
            kept={**self.kept(), **(kept or {})},
        )

    def kept(self) -> dict[str, Any]:
        """The batch's tensors by name, and task, group and copy of each of its ``episodes``."""
        named = {field.name: getattr(self.batch, field.name) for field in fields(self.batch)}
        episodes = [(t.task.id, t.group, t.copy) for t in self.trajectories]
        given = {name: column for name, column in named.items() if column is not None}
        return {**given, "episodes": episodes}

    def _broken(self, name: str, values: Tensor) -> Tensor:
        """The entries of ``values`` that count and are not finite, as bools."""
        batch = self.batch
        if name == "returns":
            return ~values.isfinite() & batch.judged
        counted = batch.judged[batch.trajectory] if name == "reward" else batch.response_mask
        if values.ndim == 2:
            counted = counted[batch.response_index.clamp(min=0)] & (batch.response_index >= 0)
        return ~values.isfinite() & counted


def check_weights(
    iteration: int,
    policy: Policy,
    optimizer: torch.optim.Optimizer | None = None,
    finite: FiniteCheck | None = None,
) -> None:
    """Look at what trains: before an iteration, or after an ``optimizer``'s step and at its state.

    Raises:
        NotFiniteError: Naming the parameter.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in policy.trainable().items()}
    tensors = {f"weight {name}": p.detach() for p, name in names.items()}
    for parameter, state in optimizer.state.items() if optimizer is not None else ():
        states = {n: v for n, v in state.items() if torch.is_tensor(v) and v.ndim}
        tensors |= {f"optimizer's {n} of {names.get(parameter)}": v for n, v in states.items()}
    if not tensors or get_total_norm(tensors.values(), float("inf")).isfinite():
        return
    name, broken = next((n, t) for n, t in tensors.items() if not t.isfinite().all())
    raise NotFiniteError(
        f"The {name} of iteration {iteration} is {float(broken[~broken.isfinite()][0])}",
        stage="start" if optimizer is None else "update",
        tensor=name,
        advice=_NO_UPDATE if optimizer is None else _of_optimizer(optimizer, name),
        kept=None if finite is None else finite.kept(),
    )


def first_broken(
    objective: Objective,
    rows: Sequence[int],
    cut: Callable[..., list[list[int]]],
    is_broken: Callable[[Objective, list[list[int]]], bool],
) -> int | None:
    """A response that is broken by itself, found by halving; ``None`` where none is."""
    batch = objective.batch
    lengths = batch.row_length

    def broken(part: Tensor) -> bool:
        kept = torch.isin(batch.response_index, part)
        alone = replace(batch, response_index=torch.where(kept, batch.response_index, -1))
        active = [row for row in rows if kept[row].any()]
        return is_broken(replace(objective, batch=alone), cut(active, lengths))

    found = batch.response_index[list(rows)].unique()
    found = found[found >= 0]
    if not len(found) or not broken(found):
        return None
    while len(found) > 1:
        half = len(found) // 2
        found = found[:half] if broken(found[:half]) else found[half:]
    return int(found[0])


def _loss_is_broken(objective: Objective, micro: list[list[int]]) -> bool:
    with torch.no_grad():
        return not all(bool(objective(rows).loss.isfinite()) for rows in micro)


def _gradient_is_broken(objective: Objective, micro: list[list[int]]) -> bool:
    objective.policy.zero_grad()
    for rows in micro:
        objective(rows).loss.backward()
    gradients = [p.grad for p in objective.policy.parameters() if p.grad is not None]
    return not get_total_norm(gradients).isfinite()


@torch.no_grad()
def cause(objective: Objective, response: int | None) -> str:
    """What made a loss or gradient not finite, as far as it can be told, and what to type."""
    given = {k: v for k, v in getattr(objective.loss, "__dict__", {}).items() if "coef" in k}
    for name, value in given.items():
        if isinstance(value, int | float) and not abs(value) <= LARGE_COEFFICIENT:
            return f"loss.{name}={value} is what did it: type a small number, e.g. loss.{name}=0.01"
    if response is not None:
        batch = objective.batch
        mine = batch.response_index == response
        per_token = objective.advantages.ndim == 2
        advantage = objective.advantages[mine if per_token else response].abs().max()
        if advantage > LARGE_ADVANTAGE:
            return (
                f"its advantage is {float(advantage):.3g}: type smaller rewards "
                "(rewards.success=..., rewards.environment=...), or advantage=grpo, which divides "
                "by their spread"
            )
        row = int(mine.any(dim=1).nonzero()[0])
        mask = mine[row : row + 1]
        logprobs, _ = objective.policy.score(
            batch.input_ids[row : row + 1], mask, objective.temperature
        )
        if logprobs.isfinite().all():
            far = float((logprobs - batch.old_logprobs[mine]).abs().max())
            if far > FAR:
                return (
                    f"the updates of this iteration moved its log-probabilities by {far:.0f} nats: "
                    "type a lower optimizer.lr=..., or update_epochs=1"
                )
    return (
        "no reward or coefficient is large: type a lower optimizer.lr=..., or "
        "trainer.precision=32-true where it is a half one"
    )


def _of_optimizer(optimizer: torch.optim.Optimizer, name: str) -> str:
    """Why a finite gradient left the tensor ``name`` not finite."""
    group: dict[str, Any] = optimizer.param_groups[0]
    if group.get("eps") == 0:
        told = "optimizer.eps=0 divides by zero where a gradient is zero. Type optimizer.eps=1e-8"
    elif name.startswith("weight"):
        told = f"optimizer.lr={group['lr']:g} is too high. Type a lower one"
    else:
        told = "its square is not. Type a smaller max_grad_norm=..., e.g. max_grad_norm=1.0"
    return f"the gradient is finite: {told}"
