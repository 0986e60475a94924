"""The monitor of adaptive entropy modulation: what it did, and where entropy went."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from aem_lightning.callbacks.loggers import log_histogram, log_scalars
from aem_lightning.callbacks.outputs import iteration_of
from aem_lightning.types import Iteration

_SIGNS = ("positive", "negative", "zero")


class AEMMonitor(Callback):
    r"""Curves of the entropies, of :math:`\alpha`, and of the predicted and measured drift.

    Besides the names of :func:`aem_statistics` it logs ``aem/entropy_drift``, the difference of
    ``aem/entropy`` to the iteration before, and histograms: ``aem/alpha`` of all responses, then
    ``aem/alpha/{sign}`` and ``aem/entropy/{sign}``, the mean token entropy of a response, of those
    with a positive and a negative advantage. Entropies are measured before the update, so
    ``aem/predicted_drift`` at iteration ``i`` speaks of ``aem/entropy_drift`` at ``i + 1``, in sign
    and trend only: the prediction (arXiv 2605.00425) is of response entropy under a
    natural-gradient step.

    With several ranks the scalars count the responses of all of them (one ``all_gather`` an
    iteration, which every rank joins); histograms show those of rank zero, which alone writes.
    """

    def __init__(self) -> None:
        self._previous: tuple[int, float] | None = None
        self._forecast: Counter[str] = Counter()

    @property
    def forecast(self) -> float | None:
        """The forecast over all iterations that this monitor has seen."""
        return forecast(self._forecast)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, *_: Any
    ) -> None:
        """Log the statistics of the iteration that ended."""
        iteration = iteration_of(outputs)
        if iteration is None:
            return
        sums = _sums(iteration)
        if trainer.world_size > 1:
            sums = _gather(trainer, sums, pl_module.device)
        self._forecast.update({k: v for k, v in sums.items() if k.startswith("forecast_")})
        metrics = _statistics(sums)
        metrics.update(self._drift(iteration.index, metrics.get("aem/entropy")))
        modulation: Any = getattr(pl_module, "modulation", None)
        if hasattr(modulation, "of_tokens"):  # REPO-R, whose zeta moves
            metrics["aem/zeta"] = modulation.zeta
        log_scalars(trainer, metrics, step=iteration.index)
        for name, values in _histograms(iteration).items():
            log_histogram(trainer, f"aem/{name}", values, step=iteration.index)

    def _drift(self, index: int, entropy: float | None) -> dict[str, float]:
        previous, self._previous = self._previous, None if entropy is None else (index, entropy)
        if entropy is None or previous is None or previous[0] != index - 1:
            return {}
        return {"aem/entropy_drift": entropy - previous[1]}

    def state_dict(self) -> dict[str, Any]:
        """The iteration and entropy that the next drift is measured from."""
        return dict(zip(("index", "entropy"), self._previous or (), strict=False))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the drift curve of an earlier run."""
        found = "entropy" in state_dict
        self._previous = (state_dict["index"], state_dict["entropy"]) if found else None


def aem_statistics(iteration: Iteration) -> dict[str, float]:
    r"""Scalars that say what modulation did to one iteration.

    Responses of masked trajectories and responses without tokens are left out. Below, ``A`` is the
    base advantage of a response, ``S`` its surprisal, :math:`\Lambda` the sum of its token
    entropies (nats). A name whose mean would be over nothing is left out of the result.

    ================================ ===============================================================
    name                             meaning
    ================================ ===============================================================
    ``aem/entropy``                  mean token entropy, over response tokens
    ``aem/response_entropy``         mean of :math:`\Lambda`, over responses
    ``aem/predicted_drift_base``     mean of :math:`A (S - \Lambda)`
    ``aem/predicted_drift``          mean of :math:`\alpha A (S - \Lambda)`
    ``aem/alpha_{mean,min,max}``     of :math:`\alpha`, over responses
    ``aem/gated_groups``             share of groups whose entropy range was under the gate
    ``aem/share_{sign}``             share of responses whose ``A`` is positive, negative, zero
    ``aem/mass_base_{sign}``         :math:`\sum |A|` of the positive, the negative ones
    ``aem/mass_{sign}``              :math:`\sum \alpha |A|` of the positive, the negative ones
    ``aem/entropy_{sign}``           mean token entropy of the responses of that sign of ``A``
    ``aem/effect_{sign}``            share of responses by sign of :math:`A (\alpha - 1)`
    ``aem/forecast``                 correlation of H-bar and :math:`|A_S|`: see `forecast`
    ================================ ===============================================================

    Source: arXiv 2605.00425, the drift theorem and the analyses of masks and dynamics.
    """
    return _statistics(_sums(iteration))


def _counted(iteration: Iteration) -> Tensor:
    batch = iteration.batch
    return (batch.response_mask & (batch.length > 0)).to(iteration.alpha.device)


def _histograms(iteration: Iteration) -> dict[str, Tensor]:
    counted = _counted(iteration).cpu()
    columns = (iteration.advantages, iteration.alpha, iteration.batch.entropy)
    advantage, alpha, entropy = (column.detach().cpu()[counted] for column in columns)
    found = {"alpha": alpha}
    for sign, chosen in (("positive", advantage > 0), ("negative", advantage < 0)):
        found |= {f"alpha/{sign}": alpha[chosen], f"entropy/{sign}": entropy[chosen]}
    return found


def _sums(iteration: Iteration) -> dict[str, float]:
    """Sums that add up over ranks (minima and maxima aside), in a fixed order of names."""
    batch = iteration.batch
    counted = _counted(iteration).cpu()

    def column(values: Tensor) -> Tensor:
        return values.detach().cpu()[counted].double()  # [R'], the counted responses

    advantage, alpha = column(iteration.advantages), column(iteration.alpha)
    length = column(batch.length)
    compensator = column(batch.entropy) * length
    drift = advantage * (column(batch.surprisal) - compensator)
    groups = float(len(set(batch.group.tolist())))
    sums = {
        "responses": float(advantage.numel()),
        "alpha": alpha.sum().item(),
        "alpha_min": alpha.min().item() if alpha.numel() else math.inf,
        "alpha_max": alpha.max().item() if alpha.numel() else -math.inf,
        "predicted_drift_base": drift.sum().item(),
        "predicted_drift": (alpha * drift).sum().item(),
        "groups": groups,
        "gated": iteration.gated * groups,
    }
    effect = (advantage * (alpha - 1)).sign()
    for sign, value in zip(_SIGNS, (1, -1, 0), strict=True):
        chosen = advantage.sign() == value
        sums[f"share_{sign}"] = chosen.sum().item()
        sums[f"tokens_{sign}"] = length[chosen].sum().item()
        sums[f"entropy_{sign}"] = compensator[chosen].sum().item()
        sums[f"mass_base_{sign}"] = advantage[chosen].abs().sum().item()
        sums[f"mass_{sign}"] = (alpha * advantage)[chosen].abs().sum().item()
        sums[f"effect_{sign}"] = (effect == value).sum().item()
    return sums | dict(iteration.forecast)


def forecast_words(value: float | None) -> str:
    """What a forecast says, for people."""
    if value is None:
        return "no forecast of what AEM would do: no mixed group met an observation twice"
    said = "it should help" if value < 0 else "it may harm" if value > 0 else "it should not matter"
    turns = "confident" if value < 0 else "uncertain"
    return (
        f"much hangs on {turns} turns (r = {value:.2f}): AEM moves steps to confident ones, {said}"
    )


def forecast(sums: Mapping[str, float]) -> float | None:
    """The correlation of H-bar and |A_S|; ``None`` where either never varied.

    Negative: much hangs on the confident turns, to which AEM moves the step, so it should help.
    Positive: on the uncertain ones, and it should harm.
    """
    n, h, a, hh, aa, ha = (
        sums.get(f"forecast_{x}", 0.0) for x in ("n", "h", "a", "hh", "aa", "ha")
    )
    spread = (n * hh - h * h) * (n * aa - a * a)
    return (n * ha - h * a) / math.sqrt(spread) if n > 2 and spread > 1e-12 * n**4 else None


def _gather(trainer: Trainer, sums: Mapping[str, float], device: torch.device) -> dict[str, float]:
    vector = torch.tensor(list(sums.values()), dtype=torch.float64, device=device)
    ranks = trainer.strategy.all_gather(vector).reshape(-1, len(sums)).cpu()  # [ranks, names]
    found = {"alpha_min": ranks.amin(dim=0), "alpha_max": ranks.amax(dim=0)}
    total = ranks.sum(dim=0)
    return {name: found.get(name, total)[place].item() for place, name in enumerate(sums)}


def _statistics(sums: Mapping[str, float]) -> dict[str, float]:
    responses = sums["responses"]
    tokens, entropy = (sum(sums[f"{of}_{sign}"] for sign in _SIGNS) for of in ("tokens", "entropy"))
    # What is averaged, and over how many.
    pairs = {
        "entropy": (entropy, tokens),
        "response_entropy": (entropy, responses),
        "alpha_mean": (sums["alpha"], responses),
        "gated_groups": (sums["gated"], sums["groups"]),
    }
    for name in ("predicted_drift_base", "predicted_drift"):
        pairs[name] = sums[name], responses
    for sign in _SIGNS:
        pairs[f"share_{sign}"] = sums[f"share_{sign}"], responses
        pairs[f"effect_{sign}"] = sums[f"effect_{sign}"], responses
        pairs[f"entropy_{sign}"] = sums[f"entropy_{sign}"], sums[f"tokens_{sign}"]
    found = {name: total / count for name, (total, count) in pairs.items() if count > 0}
    ends = ("alpha_min", "alpha_max") if responses else ()
    masses = [f"mass_{of}{sign}" for of in ("base_", "") for sign in ("positive", "negative")]
    found |= {name: sums[name] for name in (*ends, *masses)}
    if (value := forecast(sums)) is not None:
        found["forecast"] = value
    return {f"aem/{name}": value for name, value in found.items()}
