"""Whether a run learns at all: one verdict, with a name, where it does not."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from aem_lightning.callbacks.outputs import iteration_of
from aem_lightning.types import TROUBLESHOOTING, Iteration

logger = logging.getLogger(__name__)

SAMPLER_GAP_LIMIT = 0.05  # nats a token, mean: policy/sampler_gap
NO_RATE = 1e-10  # a learning rate that moves no weight of a usual size
NO_GRADIENT = 1e-6  # what clipping may leave of a gradient
MALFORMED = 0.9
# Of a measured change, from which on something else is said to have moved with it.
SHARE, NOISE = 0.3, 10.0
ROUNDING = 1e-5  # nats that a float32 log-probability may be off
ROWS, TOKENS = 8, 4096  # that are scored again after an update

_QUIET = {
    "malformed_replies": " nine of ten replies were malformed (rollout/malformed_rate). Look at "
    "transcripts/: type another prompt=..., a larger max_new_tokens=..., or start from a policy "
    "that knows the format (stage=warm_start)",
    "uniform_groups": " all copies of each task earned the same (rollout/mixed_groups is 0), so "
    "there is nothing to compare. Where all lose, type easier tasks, a larger group_size=... or a "
    "warm start; where all win, harder ones",
    "no_update": " there was no update",
}

# Where to read on, by verdict.
_SEE = {
    **dict.fromkeys((*_QUIET,), f"{TROUBLESHOOTING}#success-is-zero"),
    "sampler_differs": f"{TROUBLESHOOTING}#engine-and-trainer-differ",
    "stale_sampler": f"{TROUBLESHOOTING}#engine-and-trainer-differ",
}
_SEE_ELSE = f"{TROUBLESHOOTING}#it-does-not-learn"


@dataclass(frozen=True)
class Verdict:
    """Why a run learns nothing: a name, the iteration that showed it, and what to type."""

    name: str
    iteration: int
    text: str


@dataclass(frozen=True)
class Change:
    """How far one update moved the log-probabilities of sampled tokens: means over them, in nats.

    Attributes:
        policy: Of the policy.
        reference: Of the reference, which should stay; ``None`` where there is none.
    """

    policy: float
    reference: float | None


class LearningWatch(Callback):
    """Ends the silence of a run that learns nothing: one verdict, once.

    After each of the first ``updates`` updates it compares bits of the adapters, scores a few rows
    again, and so sees a learning rate of 0, an optimizer that does nothing, gradients of 0 or
    clipped to nothing, an engine that samples from other weights (`policy/sampler_gap`), a
    reference that moves, and tokens that are not the sampled ones. All along it counts iterations
    without anything to compare, and of malformed replies: ``patience`` of them in a row are a
    verdict, and so is a run that ends without one update.

    The first verdict is the only one. It goes to the log, to ``summary.json`` and, with ``strict``,
    ends the run in good order. It changes no weight and no random state. What it finds is rank
    zero's; the other ranks are told.

    Args:
        strict: End the run at its verdict.
        patience: Iterations in a row that teach nothing.
        updates: How many updates are looked at closely.
    """

    def __init__(self, strict: bool = False, patience: int = 10, updates: int = 3) -> None:
        self.strict, self.patience, self.updates = strict, patience, updates
        self.verdict: Verdict | None = None
        self._updated = 0
        self._symptoms: list[str | None] = []
        self._quiet: list[str] = []
        self._why = ""
        self._gap: float | None = None
        self._change: Change | None = None
        self._rate = 0.0
        self._bits: list[int] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember what the update should change."""
        self._rate = learning_rate(trainer)
        if self._looks_closely:
            self._bits = adapter_bits(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, *_: Any
    ) -> None:
        """Look at the iteration that ended."""
        done = iteration_of(outputs)
        if done is None or self.verdict is not None:
            return
        found = self._judge(trainer, pl_module, done)
        self._pronounce(trainer, found, done.index)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge a run that ended before its time of waiting was over."""
        if self.verdict is not None:
            return
        found = self._of_symptoms(len(self._symptoms), pl_module)
        if self._updated == 0 and self._quiet:
            found = self._of_quiet()
        agent: Any = pl_module
        self._pronounce(trainer, found, agent.iteration - 1)

    @property
    def _looks_closely(self) -> bool:
        return self.verdict is None and len(self._symptoms) < self.updates

    def _judge(
        self, trainer: Trainer, pl_module: LightningModule, done: Iteration
    ) -> tuple[str, str] | None:
        """Name and words of what is wrong, the cause before what follows from it."""
        quiet = self._count_quiet(trainer, done)
        if max(self._rate, learning_rate(trainer)) <= NO_RATE:
            return (
                "learning_rate_zero",
                f"the learning rate is {self._rate:g}, now and in the next iteration, so no weight "
                "moves. Type optimizer.lr=1e-5, or another scheduler=...",
            )
        if done.metrics:
            self._updated += 1
            wrong = wrong_tokens(pl_module, done) if self._updated == 1 else None
            wrong = wrong or self._of_sampler(done)
            if wrong is not None:
                return wrong
            if self._looks_closely and self._rate > NO_RATE:
                self._symptoms.append(self._symptom(pl_module, done))
                self._change = measure_change(trainer, pl_module, done)
                moved = self._change
                if moved.reference is not None and self._followed(moved.reference):
                    return (
                        "reference_moved",
                        f"the reference moved by {moved.reference:.2g} nats a token with an update "
                        f"of {moved.policy:.2g}: it has to stay the base, without the adapters",
                    )
                if len(self._symptoms) == self.updates:
                    return self._of_symptoms(self.updates, pl_module) or quiet
        return quiet

    def _symptom(self, pl_module: LightningModule, done: Iteration) -> str | None:
        """What kept this update from the weights, as far as numbers show it."""
        agent: Any = pl_module
        norm = done.metrics.get("policy/grad_norm", 1.0)
        if norm == 0:
            return "zero_gradient"
        if agent.update_settings.max_grad_norm < NO_GRADIENT * norm:
            return "clipped_to_nothing"
        return "dead_optimizer" if adapter_bits(pl_module) == self._bits else None

    def _of_symptoms(self, updates: int, pl_module: LightningModule) -> tuple[str, str] | None:
        """The verdict of updates that each had a symptom."""
        if not self._symptoms or None in self._symptoms:
            return None
        agent: Any = pl_module
        name = str(self._symptoms[0])
        texts = {
            "zero_gradient": "every gradient is 0 though the advantages are not. Do the adapters "
            "take part in the forward pass, and does loss=... depend on the log-probabilities?",
            "clipped_to_nothing": f"max_grad_norm={agent.update_settings.max_grad_norm:g} leaves "
            "less than a millionth of the gradient (see policy/grad_norm): type max_grad_norm=1.0",
            "dead_optimizer": "the gradients are not 0, and the adapters keep their bits: the "
            f"optimizer's step does nothing at optimizer.lr={self._rate:g}. Is optimizer._target_ "
            "the right one, and does it step the parameters that it is given?",
        }
        return name, f"in {updates} update(s) {texts[name]}"

    def _of_sampler(self, done: Iteration) -> tuple[str, str] | None:
        """Whether the engine samples from what the trainer scores: `policy/sampler_gap`."""
        gap = done.metrics.get("policy/sampler_gap")
        if gap is None or done.lag:  # a sampler that is meant to be behind
            return None
        first = self._gap is None
        floor = gap if self._gap is None else self._gap
        self._gap = floor
        if first and gap > SAMPLER_GAP_LIMIT:
            return (
                "sampler_differs",
                f"policy/sampler_gap is {gap:.2g} nats a token before any update of this run "
                f"(limit {SAMPLER_GAP_LIMIT}): the engine samples from other weights, at another "
                "temperature or in another precision than the trainer scores",
            )
        jumped = gap > max(SAMPLER_GAP_LIMIT, NOISE * floor)
        followed = self._change is not None and self._followed(gap)
        if first or not (jumped or followed):
            return None
        moved = "" if self._change is None else f" after an update of {self._change.policy:.2g}"
        return (
            "stale_sampler",
            f"policy/sampler_gap rose from {floor:.2g} to {gap:.2g} nats a token{moved}: the "
            "engine still samples from earlier weights. engine.sync has to take the new ones",
        )

    def _followed(self, moved: float) -> bool:
        """Whether something that should stay moved with the last measured update."""
        floor = max(self._gap or 0.0, ROUNDING)
        change = 0.0 if self._change is None else self._change.policy
        return change > NOISE * floor and moved > max(SHARE * change, NOISE / 2 * floor)

    def _count_quiet(self, trainer: Trainer, done: Iteration) -> tuple[str, str] | None:
        """Count iterations in a row that teach nothing; a verdict when ``patience`` is over."""
        turns = [turn for t in done.played if t.infra_error is None for turn in t.turns]
        malformed = sum(turn.action is None for turn in turns)
        compared = int(done.advantages.count_nonzero())
        counts = torch.tensor([malformed, len(turns), compared], device=done.advantages.device)
        counts = trainer.strategy.reduce(counts, reduce_op="sum")
        malformed, total, compared = counts.tolist()
        if total and malformed >= MALFORMED * total:
            self._quiet.append("malformed_replies")
        elif not compared:
            self._why = done.skipped or "every group is uniform"
            self._quiet.append("uniform_groups" if "uniform" in self._why else "no_update")
        else:
            self._quiet.clear()
        return self._of_quiet() if len(self._quiet) >= self.patience else None

    def _of_quiet(self) -> tuple[str, str]:
        """The verdict of iterations that taught nothing: what most of them lacked."""
        ((name, _),) = Counter(self._quiet).most_common(1)
        why = f": {self._why}" if name == "no_update" else ""
        return name, f"in {len(self._quiet)} iteration(s) in a row{_QUIET[name]}{why}"

    def _pronounce(self, trainer: Trainer, found: tuple[str, str] | None, iteration: int) -> None:
        if trainer.world_size > 1:
            found = trainer.strategy.broadcast(found)
        if found is None:
            return
        self.verdict = Verdict(found[0], iteration, found[1])
        if trainer.is_global_zero:
            see = _SEE.get(found[0], _SEE_ELSE)
            text = "verdict %s (iteration %d): %s (see %s)"
            logger.warning(text, found[0], iteration + 1, found[1], see)
        if self.strict:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know; after a verdict it is judged anew: it may be mended."""
        quiet = self._quiet if self.verdict is None else []
        return {"updated": self._updated, "quiet": list(quiet)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._updated, self._quiet = state_dict["updated"], list(state_dict["quiet"])


def learning_rate(trainer: Trainer) -> float:
    """The largest learning rate of all parameter groups."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return max((float(group["lr"]) for group in groups if "lr" in group), default=1.0)


def adapter_bits(pl_module: LightningModule) -> list[int]:
    """A sum over the bits of each trainable tensor: what changes where any bit does."""
    agent: Any = pl_module
    wide = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
    sums = [
        p.detach().contiguous().view(wide[p.element_size()]).sum(dtype=torch.int64)
        for p in agent.policy.parameters()
        if p.requires_grad
    ]
    return torch.stack(sums).tolist() if sums else []


def wrong_tokens(pl_module: LightningModule, done: Iteration) -> tuple[str, str] | None:
    """Whether what is trained on decodes to what was sampled, in the first episodes."""
    agent: Any = pl_module
    batch = done.batch
    for r in range(min(ROWS, batch.num_responses)):
        turn = done.trajectories[int(batch.trajectory[r])].turns[int(batch.turn[r])]
        trained = batch.input_ids[batch.response_index == r].tolist()
        if agent.encoder.decode(trained) != turn.response:
            return (
                "wrong_tokens",
                f"trained on is {agent.encoder.decode(trained)!r}, and sampled was "
                f"{turn.response!r}: the ids of a response have to be those of the engine",
            )
    return None


def measure_change(trainer: Trainer, pl_module: LightningModule, done: Iteration) -> Change:
    """How far the update moved the policy and its reference, on a few of the batch's rows."""
    agent: Any = pl_module
    batch = done.batch
    inside = (batch.response_index >= 0) & batch.response_mask[batch.response_index.clamp(min=0)]
    rows = inside.any(dim=1).nonzero()[:, 0]
    if not len(rows):
        return Change(0.0, None)
    rows = rows[:: max(1, len(rows) // ROWS)][:ROWS]
    rows = rows[: max(1, TOKENS // int(batch.row_length.max()))]
    mask = inside[rows]

    def distance(before: Tensor) -> float:
        logprobs, _ = agent.scores(batch, [rows.tolist()])
        return float((logprobs[rows] - before[rows])[mask].abs().mean())

    with _unseen(trainer, rows.device):
        moved = distance(batch.old_logprobs)
        if batch.ref_logprobs is None:
            return Change(moved, None)
        with agent.policy.reference():
            return Change(moved, distance(batch.ref_logprobs))


@contextlib.contextmanager
def _unseen(trainer: Trainer, device: torch.device) -> Iterator[None]:
    """A pass that leaves no trace: no gradient, and no draw of a dropout."""
    devices = [device] if device.type == "cuda" else []
    with (
        torch.no_grad(),
        torch.random.fork_rng(devices=devices),
        trainer.precision_plugin.forward_context(),
    ):
        yield
