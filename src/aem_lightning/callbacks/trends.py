"""Curves that run away: entropy, the distance to the old policy, the length of responses."""

from __future__ import annotations

import logging
import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT

from aem_lightning.callbacks.outputs import iteration_of
from aem_lightning.collectives import of_each_rank
from aem_lightning.types import TROUBLESHOOTING, Iteration

logger = logging.getLogger(__name__)

COLLAPSE = 0.1  # of the entropy that the run began with
ERUPTION, LEAST_ERUPTION = 3.0, 0.5  # times that entropy, and nats above it
BLOW_UP = 0.5  # nats a token between the policy before and after an iteration
SEE = f"{TROUBLESHOOTING}#entropy-falls"
GROWTH, LEAST_GROWTH = 2.0, 16.0  # times the length that the run began with, and tokens above it


class TrendWatch(Callback):
    """Warns once of each curve that runs away, and names the panel to look at.

    Curves are those of all ranks. Means over ``window`` iterations are compared with those of the
    first ones. One KL that is not finite is enough.

    Args:
        window: Iterations that a mean is over.
    """

    def __init__(self, window: int = 5) -> None:
        self._window = window
        self._first: list[dict[str, float]] = []
        self._last: list[dict[str, float]] = []
        self._said: list[str] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, *_: Any
    ) -> None:
        """Look at the curves with the iteration that ended."""
        done = iteration_of(outputs)
        point = None if done is None else curves_of(done)
        if done is None or point is None:
            return
        if len(self._first) < self._window:
            self._first.append(point)
        self._last = [*self._last, point][-self._window :]
        for name, text in self._found(point).items():
            if name not in self._said:
                self._said.append(name)
                if trainer.is_global_zero:
                    told = name, done.index + 1, text, SEE
                    logger.warning("%s (iteration %d): %s (see %s)", *told)

    def _found(self, point: dict[str, float]) -> dict[str, str]:
        """What runs away, by name."""
        entropy, kl, length = (_mean(self._last, n) for n in ("entropy", "kl", "length"))
        first = {name: _mean(self._first, name) for name in ("entropy", "length")}
        found = {}
        if not math.isfinite(point["kl"]) or (len(self._last) == self._window and kl > BLOW_UP):
            found["KL blow-up"] = (
                f"policy/approx_kl is {point['kl']:.2g} nats a token, {kl:.2g} on average. See "
                "policy/approx_kl, policy/clip_fraction and policy/ref_kl; a lower optimizer.lr or "
                "fewer update_epochs keep the policy closer"
            )
        if len(self._first) < self._window:
            return found
        if entropy < COLLAPSE * first["entropy"]:
            found["entropy collapse"] = (
                f"from {first['entropy']:.3g} to {entropy:.3g} nats a token: copies of a task "
                "become alike. See aem/entropy and rollout/mixed_groups; loss=adaptive_entropy "
                "holds a target"
            )
        if entropy > max(ERUPTION * first["entropy"], first["entropy"] + LEAST_ERUPTION):
            found["entropy eruption"] = (
                f"from {first['entropy']:.3g} to {entropy:.3g} nats a token. See aem/entropy and "
                "rollout/malformed_rate; a lower optimizer.lr or loss.entropy_coef calms it"
            )
        if length > max(GROWTH * first["length"], first["length"] + LEAST_GROWTH):
            found["growing length"] = (
                f"from {first['length']:.0f} to {length:.0f} tokens a response. See "
                "rollout/response_tokens and rollout/truncated_rate; algorithm=dapo punishes "
                "overlong responses"
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        """Where the curves began, where they are, and what was said of them."""
        return {"first": self._first, "last": self._last, "said": self._said}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the curves of an earlier run."""
        self._first, self._last = list(state_dict["first"]), list(state_dict["last"])
        self._said = list(state_dict["said"])


def curves_of(done: Iteration) -> dict[str, float] | None:
    """Mean token entropy in nats, KL of the update in nats a token, tokens a response.

    Over the responses of all ranks, which all call it; ``None`` where there are none.
    """
    counted = done.batch.response_mask
    length, entropy = done.batch.length[counted], done.batch.entropy[counted]
    sums = len(length), float(length.sum()), float((entropy * length).sum())
    responses, tokens, nats = map(sum, zip(*of_each_rank(sums), strict=True))
    if not responses:
        return None
    return {
        "entropy": nats / max(1.0, tokens),
        "kl": done.metrics.get("policy/approx_kl", 0.0),
        "length": tokens / responses,
    }


def _mean(points: list[dict[str, float]], name: str) -> float:
    return sum(point[name] for point in points) / max(1, len(points))
