"""Analysis A: how well alpha - 1 stands in for the quantity that the theorem asks for.

The drift of a response is A(S - H), with the entropy H of its state, which cannot be computed while
training. Here it is estimated at some states, by drawing many responses at each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from aem_lightning.analysis.inputs import ProxySettings, checkpoint_wishes, proxy_settings
from aem_lightning.analysis.report import (
    Picture,
    need_matplotlib,
    new_figure,
    relative,
    write_report,
)
from aem_lightning.analysis.sampling import PlayedState, draw_responses, met_states
from aem_lightning.analysis.statistics import (
    bootstrap,
    co_moments,
    pearson,
    share,
)
from aem_lightning.functional import aem_coefficients
from aem_lightning.runner.evaluation import restored

if TYPE_CHECKING:
    pass

# arXiv 2605.00425, the analysis of the proxy.
PAPER = {"pearson": 0.63, "states_agreeing": 55, "states": 64, "samples": 64}


@dataclass(frozen=True)
class Sampled:
    """Responses drawn at fixed states, as columns [P]; P = states x samples.

    Attributes:
        state: Index of the state.
        length: Tokens.
        surprisal: S, minus the log-probability of the response, in nats.
        compensator: Λ, the sum of its token entropies, in nats.
    """

    state: Tensor
    length: Tensor
    surprisal: Tensor
    compensator: Tensor

    @property
    def entropy(self) -> Tensor:
        """H-bar, the mean token entropy, [P]."""
        return self.compensator / self.length

    def proxy(self, name: str) -> Tensor:
        """What stands for the entropy of each response under ``modulation.proxy``, [P]."""
        if name == "relative_surprisal":
            return self.surprisal - self.mean_of_state(self.compensator)[self.state]
        return self.compensator if name == "entropy_sum" else self.entropy

    @property
    def states(self) -> int:
        """Their number K."""
        return int(self.state.max()) + 1

    def mean_of_state(self, values: Tensor) -> Tensor:
        """The mean of ``values`` [P] over each state, [K]; of the surprisal it is H_MC."""
        sums = values.new_zeros(self.states, dtype=torch.float64)
        counts = torch.bincount(self.state, minlength=self.states)
        return sums.index_add(0, self.state, values.double()) / counts

    def within_state(self, values: Tensor) -> Tensor:
        """``values`` [P] minus their mean over their state."""
        return values - self.mean_of_state(values)[self.state]


def proxy(cfg: DictConfig) -> dict[str, Any]:
    """Draw responses with the policy of ``cfg.ckpt`` and correlate."""
    need_matplotlib()
    settings = proxy_settings(cfg)
    with restored(checkpoint_wishes(cfg)) as agent:
        agent.module.engine.sync(agent.module.policy, agent.module.iteration)
        met = met_states(agent.module, agent.datamodule, settings)
        drawn = draw_responses(agent.module, [state.prompt for state in met], settings)
    sampled = columns(drawn)
    content = {
        "checkpoint": relative(agent.path),
        "iteration": agent.module.iteration,
        "temperature": agent.module.rollout.temperature,
        **asdict(settings),
        "sampled": sampled_statistics(sampled, settings),
        "played": played_statistics(met, sampled, settings),
        "paper": PAPER,
    }
    return write_report(
        Path(cfg.paths.output_dir),
        "proxy",
        content,
        _draw(met, sampled, content, settings),
        scalars=_scalars(content),
        table=_table(content),
    )


def columns(drawn: Sequence[Sequence[tuple[int, float, float]]]) -> Sampled:
    """The table of (length, S, Λ) of the responses drawn at each state."""
    rows = torch.tensor([row for rows in drawn for row in rows], dtype=torch.float64)
    state = torch.tensor([k for k, rows in enumerate(drawn) for _ in rows])
    return Sampled(state, rows[:, 0], rows[:, 1], rows[:, 2])


def sampled_statistics(sampled: Sampled, settings: ProxySettings) -> dict[str, Any]:
    """Every drawn response against its state, alpha being compared within the state.

    ``pearson`` and ``sign_agreement`` are of α−1 and −(S − H_MC), over states whose entropy range
    passes the gate; ``states_agreeing`` of them have a positive correlation of their own.
    ``compensator`` is the same correlation for −(Λ − mean Λ), which nothing has divided by a
    length; ``length`` correlates length and surprisal within states. These use all states, and so
    do the three proxies that AEM may take: α−1 of each, against −(S − H_MC).
    """
    alpha = state_alpha(sampled, settings)
    target = -sampled.within_state(sampled.surprisal)
    unnormalised = -sampled.within_state(sampled.compensator)
    length = sampled.within_state(sampled.length)
    by_state = partial(co_moments, cluster=sampled.state, count=sampled.states)
    open_states = sampled.mean_of_state((alpha != 1).double()) > 0  # [K]
    of_each = pearson(by_state(alpha - 1, target)[open_states])
    return {
        **_agreement(alpha - 1, target, sampled.state, open_states, settings),
        "states_agreeing": int((of_each > 0).sum()),
        "states_ungated": int(open_states.sum()),
        "compensator": _correlation(by_state(unnormalised, target), settings),
        **{
            name: _correlation(by_state(state_alpha(sampled, settings, name) - 1, target), settings)
            for name in ("mean_entropy", "entropy_sum", "relative_surprisal")
        },
        "length": _correlation(by_state(length, -target), settings),
        "one_token_share": float((sampled.length == 1).double().mean()),
    }


def played_statistics(
    met: Sequence[PlayedState], sampled: Sampled, settings: ProxySettings
) -> dict[str, Any]:
    """The response that was played at each state, alpha being compared within its task's group.

    As training uses it: one point a state, H_MC from the drawn responses. Gated groups, whose α is
    1, are left out and counted.
    """
    alpha, target = played_points(met, sampled)
    kept = alpha != 1
    count = int(kept.sum())
    x, y = (alpha - 1)[kept], target[kept]
    every = torch.ones(count, dtype=torch.bool)
    return {
        **_agreement(x, y, torch.arange(count), every, settings),
        "states_agreeing": int((x * y > 0).sum()),
        "states_ungated": count,
    }


def played_points(met: Sequence[PlayedState], sampled: Sampled) -> tuple[Tensor, Tensor]:
    """α and −(S − H_MC) of the response that was played at each state, [K] each."""
    alpha = torch.tensor([state.alpha for state in met], dtype=torch.float64)
    surprisal = torch.tensor([state.surprisal for state in met], dtype=torch.float64)
    return alpha, sampled.mean_of_state(sampled.surprisal) - surprisal


def state_alpha(sampled: Sampled, settings: ProxySettings, proxy: str = "mean_entropy") -> Tensor:
    """AEM's coefficient of each drawn response among those of its state, [P]."""
    return aem_coefficients(
        sampled.proxy(proxy),
        sampled.state,
        sharpness=settings.sharpness,
        min_range=settings.min_range,
    )


def _agreement(
    x: Tensor, y: Tensor, state: Tensor, kept: Tensor, settings: ProxySettings
) -> dict[str, Any]:
    """Correlation of points [P] and share of equal signs, over the ``kept`` ones of K states."""
    points = torch.stack([(x * y > 0).double(), torch.ones_like(x, dtype=torch.float64)], dim=1)
    signs = points.new_zeros(len(kept), 2).index_add(0, state, points)[kept]
    agree = bootstrap(signs, share, draws=settings.draws, seed=settings.seed)
    moments = co_moments(x, y, state, len(kept))[kept]
    return {"pearson": _correlation(moments, settings), "sign_agreement": asdict(agree)}


def _correlation(moments: Tensor, settings: ProxySettings) -> dict[str, Any]:
    return asdict(bootstrap(moments, pearson, draws=settings.draws, seed=settings.seed))


_ROWS = (
    ("sampled", "pearson", "r of α−1 and −(S−H), drawn responses"),
    ("sampled", "sign_agreement", "their signs agree"),
    ("played", "pearson", "r of α−1 and −(S−H), played responses"),
    ("played", "sign_agreement", "their signs agree"),
    ("sampled", "compensator", "r of −(Λ−mean Λ) and −(S−H)"),
    ("sampled", "mean_entropy", "r of α−1 and −(S−H), all drawn: proxy=mean_entropy"),
    ("sampled", "entropy_sum", "proxy=entropy_sum"),
    ("sampled", "relative_surprisal", "proxy=relative_surprisal"),
    ("sampled", "length", "r of length and S, within states"),
)


def _scalars(content: dict[str, Any]) -> dict[str, float | None]:
    return {f"{view}_{name}": content[view][name]["value"] for view, name, _ in _ROWS}


def _table(content: dict[str, Any]) -> str:
    lines = ["| | value | 95 % interval | states |", "|---|---:|---:|---:|"]
    for view, name, label in _ROWS:
        found = content[view][name]
        if found["value"] is None:
            lines.append(f"| {label} | – | – | {found['count']} |")
            continue
        low, high = found["low"], found["high"]
        interval = "–" if low is None else f"[{low:.2f}, {high:.2f}]"
        lines.append(f"| {label} | {found['value']:.2f} | {interval} | {found['count']} |")
    for view in ("sampled", "played"):
        part = content[view]
        agreeing = f"{part['states_agreeing']} of {part['states_ungated']}"
        lines.append(f"| states that agree, {view} responses | {agreeing} | | |")
    return "\n".join(lines)


def _draw(
    met: Sequence[PlayedState], sampled: Sampled, content: dict[str, Any], settings: ProxySettings
) -> Picture:
    figure = new_figure(13, 4.6)
    drawn, played, lengths = figure.subplots(1, 3)
    alpha = state_alpha(sampled, settings)
    drawn.plot(-sampled.within_state(sampled.surprisal), alpha - 1, ".", markersize=2, alpha=0.4)
    drawn.set_title(f"Drawn responses: {_said(content['sampled'])}", fontsize=10)
    alpha, target = played_points(met, sampled)
    played.plot(target, alpha - 1, "o", markersize=4)
    played.set_title(f"Played responses: {_said(content['played'])}", fontsize=10)
    for axes in (drawn, played):
        axes.axhline(0, color="0.8", linewidth=1)
        axes.axvline(0, color="0.8", linewidth=1)
        axes.set_xlabel("−(S − H_MC) (nats): what the theorem asks for")
        axes.set_ylabel("α − 1: what AEM does")
    lengths.plot(sampled.length, sampled.surprisal, ".", markersize=2, alpha=0.4)
    lengths.set_title("What a mean over tokens cannot see: length", fontsize=10)
    lengths.set(xlabel="length of a drawn response (tokens)", ylabel="surprisal S (nats)")
    title = (
        f"AEM's proxy beside the theorem's target, iteration {content['iteration']}: a dot a "
        f"response, of {content['states']} states with {content['samples']} drawn in each"
    )
    figure.suptitle(title)
    return Picture(figure, title)


def _said(view: dict[str, Any]) -> str:
    found = view["pearson"]
    if found["value"] is None:
        return "r = –"
    ends = "" if found["low"] is None else f" [{found['low']:.2f}, {found['high']:.2f}]"
    return f"r = {found['value']:.2f}{ends}, {found['count']} states"
