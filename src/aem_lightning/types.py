"""Plain data shared by every room of the house: tasks, turns, trajectories, rollout batches.

One idea: **a response is the unit.** The environment reacts to a response, AEM scores a response,
and the loss is spread over the tokens of a response. So a rollout batch holds a table of responses,
and every token knows which response it belongs to.

This module imports neither torch nor lightning at run time, so that environment workers start
light.

Letters: ``S`` sequences (rows), ``L`` tokens of a row, ``R`` responses, ``N`` trajectories, ``G``
group size.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FinishReason = Literal["stop", "length"]
AnchorBy = Literal["observation", "admissible_actions"]

# What errors and warnings refer to, with the heading of their symptom behind it.
TROUBLESHOOTING = "docs/troubleshooting.md"

# Numbers that options are made of; the runner holds what is typed against them.
Count = Annotated[int, Ge(1), Le(2**31 - 1)]
Places = Annotated[int, Ge(1), Le(2**16)]  # at once: each has memory of its own
Natural = Annotated[int, Ge(0), Le(2**31 - 1)]
Seed = Annotated[int, Ge(0), Le(2**32 - 1)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]

Tool = Mapping[str, Any]
"""A tool as chat templates take it, with ``action`` beside: the environment's words for a call."""


def function_tool(
    name: str,
    description: str,
    arguments: Mapping[str, Any],
    *,
    optional: Sequence[str] = (),
    action: str | None = None,
) -> Tool:
    """A `Tool`; ``arguments`` are JSON schemas by name, or what a text says.

    Args:
        name: What it is called by.
        description: What it does, for the policy.
        arguments: By name.
        optional: Those that may be left out.
        action: The environment's words for a call, ``click[{target}]``; ``None``: the call as JSON,
            or, of the one text of the only tool, that text.
    """
    properties = {
        key: {"type": "string", "description": about} if isinstance(about, str) else dict(about)
        for key, about in arguments.items()
    }
    required = [key for key in properties if key not in optional]
    parameters = {"type": "object", "properties": properties, "required": required}
    function = {"name": name, "description": description, "parameters": parameters}
    says = {} if action is None else {"action": action}
    return {"type": "function", "function": function, **says}


@dataclass(frozen=True, slots=True)
class Task:
    """One start state of an environment: an ALFWorld game, a WebShop goal, a SWE instance.

    Attributes:
        id: Unique and stable; handed to the environment as ``reset(options={"task_id": id})``.
        type: What results are broken down by, e.g. ``pick_and_place_simple``.
        split: The split that the task belongs to, e.g. ``train`` or ``valid_unseen``.
    """

    id: str
    type: str = ""
    split: str = ""


@dataclass(frozen=True, slots=True)
class ResetRequest:
    """A wish for a fresh episode.

    Attributes:
        task_id: The start state.
        seed: Seed of the environment's own randomness; the copies of a group share it.
        affinity: Episodes with the same number are played by the same worker: a group's number.
        uses_reward: The environment's own reward counts; one that does not is not looked at.
    """

    task_id: str
    seed: int = 0
    affinity: int = 0
    uses_reward: bool = True


@dataclass(frozen=True, slots=True)
class EnvStep:
    """An environment's answer to ``reset`` or ``step``: Gymnasium's five results, with text.

    Reserved keys of ``info``: ``task_id``, ``goal``, ``admissible_actions``, ``is_action_valid``,
    ``score``, ``won``, ``infra_error``.
    """

    observation: str
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def admissible_actions(self) -> tuple[str, ...]:
        return tuple(self.info.get("admissible_actions") or ())

    @property
    def is_action_valid(self) -> bool:
        return bool(self.info.get("is_action_valid", True))

    @property
    def won(self) -> bool:
        return bool(self.info.get("won", False))

    @property
    def infra_error(self) -> str | None:
        return self.info.get("infra_error") or None


@dataclass(slots=True)
class Turn:
    """One observation and the response to it.

    Attributes:
        observation: The text that the environment showed.
        admissible_actions: What the environment would have accepted, where it says so.
        response: The response, decoded for people; training uses the sampled ids only.
        action: The action found in the response; ``None`` where there is none (a malformed
            response).
        row: Index into ``Trajectory.rows`` of the row that holds the sampled ids.
        start: Position of the response's first token in that row.
        logprobs: Log-probability of each sampled token under the sampler, in nats.
        entropies: Full-vocabulary entropy at each sampled token, in nats; ``None`` where the engine
            has none.
        finish_reason: ``stop`` (the end token is part of the response) or ``length``.
        reward: What the environment (and the reward shaping) gave for the action.
        is_valid: The action was admissible. A malformed response is never valid.
        malformed: Why the response holds no action: a kind (`malformed_kinds`), and what it is
            about. Empty where it holds one.
        messages: What was sent to a model that is talked to in messages; else the prompt stands in
            the row, before ``start``.
    """

    observation: str
    admissible_actions: tuple[str, ...]
    response: str
    action: str | None
    row: int
    start: int
    logprobs: list[float]
    entropies: list[float] | None
    finish_reason: FinishReason = "stop"
    reward: float = 0.0
    is_valid: bool = True
    messages: Sequence[Mapping[str, Any]] | None = None
    malformed: str = ""

    @property
    def length(self) -> int:
        return len(self.logprobs)


MALFORMED = (
    *("no action", "several actions", "no thought"),
    *("no call", "several calls", "not JSON", "no object", "unknown tool"),
    *("missing argument", "unknown argument", "empty argument", "wrong argument"),
)
"""The kinds of reasons why a response is malformed: the first two words of each reason."""


def malformed_kinds(turns: Iterable[Turn]) -> Counter[str]:
    """How many of ``turns`` are malformed, by kind (`MALFORMED`).

    Example:
        >>> lost = dict(row=0, start=0, logprobs=[], entropies=None)
        >>> reasons = ("unknown tool 'fly'", "unknown tool 'run'", "no call")
        >>> turns = [Turn("", (), "", None, malformed=reason, **lost) for reason in reasons]
        >>> malformed_kinds(turns)
        Counter({'unknown tool': 2, 'no call': 1})
    """
    reasons = (turn.malformed for turn in turns if turn.action is None)
    kinds = (" ".join(reason.split()[:2]).rstrip(":") for reason in reasons)
    return Counter(kind if kind in MALFORMED else "no action" for kind in kinds)


@dataclass(slots=True)
class Trajectory:
    """The turns of one episode of one environment copy.

    Attributes:
        task: The start state; shared by the ``group_size`` trajectories of a group.
        group: Index of the group within the iteration.
        copy: Index within the group.
        rows: Token ids as the policy saw and wrote them. A turn whose prompt extends the row before
            it is appended there (``memory=transcript``: one row a trajectory); otherwise it opens a
            new row (``memory=window``: one row a turn).
        won: The environment's own word of success.
        score: A graded result where the environment has one, else 1.0 for a win and 0.0 otherwise.
        truncated: Cut by a limit (turns, context) rather than ended by the environment.
        infra_error: What broke outside the policy's doing; such a trajectory is left out of the
            loss.
        reason: Why it was not won, where the environment says so: ``info["reason"]``.
        round: The collection round that played it; 0 unless dynamic sampling asks for more.
    """

    task: Task
    group: int
    copy: int
    turns: list[Turn] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)
    won: bool = False
    score: float = 0.0
    truncated: bool = False
    infra_error: str | None = None
    round: int = 0
    reason: str = ""

    @property
    def key(self) -> str:
        """What the episode is called within its iteration."""
        return f"{self.group}/{self.copy}"

    @property
    def total_reward(self) -> float:
        # Exact, so that the same rewards in another order are the same return.
        try:
            return math.fsum(turn.reward for turn in self.turns)
        except (OverflowError, ValueError):  # over the largest float; infinities of both signs
            return math.nan

    @property
    def response_tokens(self) -> int:
        return sum(turn.length for turn in self.turns)


@dataclass(slots=True)
class RolloutBatch:
    """Everything that one iteration collected, as tensors.

    ========================= ======= ============================================================
    name                      shape   meaning
    ========================= ======= ============================================================
    ``input_ids``             [S, L]  rows, padded on the right
    ``row_length``            [S]     valid tokens of a row
    ``response_index``        [S, L]  -1 outside responses, else the response r of 0..R-1
    ``old_logprobs``          [S, L]  of the sampled token before the update, fp32; 0 elsewhere
    ``ref_logprobs``          [S, L]  the same under the reference policy; None without ``kl_coef``
    ``sampler_logprobs``      [S, L]  of the sampled token as the engine saw it, fp32; 0 elsewhere
    ``entropies``             [S, L]  fp32, full-vocabulary token entropy in nats, detached
    ``action_mask``           [S, L]  bool: tokens of the action; None unless something needs them
    ``values``                [S, L]  before each response token, fp32; None without a value head
    ``value_targets``         [S, L]  what the value head should have said; None without one
    ``trajectory``            [R]     the trajectory of a response
    ``turn``                  [R]     its turn
    ``length``                [R]     its tokens
    ``entropy``               [R]     H-bar: the mean of its token entropies
    ``surprisal``             [R]     S: minus the sum of its log-probabilities
    ``reward``                [R]     its reward
    ``valid``                 [R]     bool: its action was admissible
    ``anchor``                [R]     id of the observation it answers; equal for equal texts
    ``group``                 [N]     the group of a trajectory
    ``returns``               [N]     the undiscounted sum of its rewards
    ``judged``                [N]     bool: False where the return says nothing about the policy
    ``won``                   [N]     bool: the environment called it a success
    ``loss_mask``             [N]     bool: False keeps the trajectory out of the loss and of the
                                      statistics over responses; implies nothing about its return
    ========================= ======= ============================================================
    """

    input_ids: Tensor
    row_length: Tensor
    response_index: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor | None
    entropies: Tensor
    trajectory: Tensor
    turn: Tensor
    length: Tensor
    entropy: Tensor
    surprisal: Tensor
    reward: Tensor
    valid: Tensor
    anchor: Tensor
    group: Tensor
    returns: Tensor
    loss_mask: Tensor
    judged: Tensor
    sampler_logprobs: Tensor | None = None
    action_mask: Tensor | None = None
    values: Tensor | None = None
    value_targets: Tensor | None = None
    won: Tensor | None = None

    @property
    def num_responses(self) -> int:
        return int(self.trajectory.shape[0])

    @property
    def num_trajectories(self) -> int:
        return int(self.group.shape[0])

    @property
    def response_group(self) -> Tensor:
        """The group of each response, [R]."""
        return self.group[self.trajectory]

    @property
    def row_group(self) -> Tensor:
        """The group of each row, [S]: that of a response in it, and every row holds one."""
        if not len(self.row_length):
            return self.row_length
        return self.response_group[self.response_index.amax(dim=1)]

    @property
    def response_mask(self) -> Tensor:
        """True for the responses whose trajectory takes part in the loss, [R] bool."""
        return self.loss_mask[self.trajectory]

    def to(self, device: torch.device | str) -> RolloutBatch:
        """The same batch with every tensor on ``device``."""
        moved = {
            f.name: getattr(self, f.name).to(device)
            for f in fields(self)
            if getattr(self, f.name) is not None
        }
        return replace(self, **moved)


@dataclass(slots=True)
class Iteration:
    """What one training step did; callbacks read it as ``outputs["iteration"]`` and change nothing.

    Attributes:
        index: Number of this iteration, from 0; x axis of every curve.
        trajectories: The episodes that are trained on, for transcripts and success rates.
        batch: The rollout batch, on the training device.
        advantages: Base advantage of each response, [R]; PPO: the mean over its tokens.
        alpha: Modulation coefficient of each response, [R]; ones without modulation.
        gated: Share of the groups whose entropy range was under the gate (their alpha is 1).
        seconds: Wall time by stage, in the order of the paper's cost table: ``rollout``,
            ``environment`` (inside rollout), ``old_logprobs``, ``ref_logprobs``, ``advantage``,
            ``modulation``, ``update``.
        metrics: Scalars of the update, e.g. ``policy/approx_kl``.
        skipped: The reason why there was no update (every group uniform), else ``None``.
        entropy_source: Where the token entropies came from: ``engine`` or ``trainer``.
        forecast: Sums for the correlation of response entropies and sizes of step advantages.
        dropped: Episodes that were played and not trained on: dynamic sampling's uniform groups.
        lag: Iterations between the weights that played and those of the update; ``None`` where it
            is always 0.
    """

    index: int
    trajectories: Sequence[Trajectory]
    batch: RolloutBatch
    advantages: Tensor
    alpha: Tensor
    gated: float
    seconds: Mapping[str, float]
    metrics: Mapping[str, float]
    skipped: str | None = None
    entropy_source: Literal["engine", "trainer"] = "engine"
    dropped: Sequence[Trajectory] = ()
    forecast: Mapping[str, float] = field(default_factory=dict)
    lag: int | None = None

    @property
    def played(self) -> list[Trajectory]:
        """Every episode of the iteration, trained on or not."""
        return [*self.trajectories, *self.dropped]
