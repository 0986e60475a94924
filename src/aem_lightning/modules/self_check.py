"""The self-check: a few real tokens, scored in every way that a run scores them, before it does.

What a policy is trained on are log-probabilities that this project computes by parts of the model,
in padded rows, in packed rows and over the engine's cache. Here each is compared with the logits of
the model's own forward pass. A family that one of the parts gets wrong ends the run at its start.

It is the one trial of a run: what comes out right here is tried neither by packing nor by the
engine again. What does not is: their own smaller trials say whether ``auto`` has another way.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

from aem_lightning.modules import attention
from aem_lightning.modules.policy import Policy
from aem_lightning.modules.settings import Packing
from aem_lightning.rollout import Request, RolloutEngine, Sampling, slot_model
from aem_lightning.rollout.head import widest_window
from aem_lightning.rollout.sampling import evaluated
from aem_lightning.rollout.slot_cache import compute_dtype

log = logging.getLogger(__name__)

TEXTS = (
    "You are in the middle of a room. Looking quickly around you, you see a bed 1, a desk 2, a desk"
    " 1, a drawer 3, a drawer 2, a laundryhamper 1, a shelf 1 and a sidetable 1. Your task is to:"
    " put a clean mug into the coffeemachine. What do you do next, and why?",
    "The report asks for two changes: read the file once, and keep the old name as an alias."
    " Say which line you would edit first.",
)
# What differs, and what to type then.
_WAYS = {
    "padded": ("in padded rows", "another policy.model=..., or policy.dtype=float32"),
    "packed": ("in packed rows", "packing=padded"),
    "engine": ("as the engine samples", "engine=auto, or engine=plain"),
}
_TOKENS, _DRAWN, _LEAST = 24, 2, 3
# What may be computed for it: floating-point operations, on a CPU and on a GPU, and logits.
_OPERATIONS = {"cpu": 2e10, "cuda": 1e13}
_LOGITS = 2**26
CHECKED: WeakSet[Policy] = WeakSet()
"""Policies that have passed."""


@dataclass(frozen=True)
class Gaps:
    """How far log-probabilities are from the model's own, in nats a token.

    The largest gap in full precision, where another order of summation is all that may differ: a
    hundred-thousandth of a nat. In half precision, which rounds logits of 20 by 0.06, the mean.

    Attributes:
        padded: Of `Policy.score`.
        packed: Of it in packed rows; ``None`` where the model is not packed.
        engine: Of what the engine reports of its tokens, or of their entropies; ``None`` without
            one.
        allowed: More ends the run.
        tokens: Of the longer text.
    """

    padded: float
    packed: float | None
    engine: float | None
    allowed: float
    tokens: int

    def __str__(self) -> str:
        found = {name: getattr(self, name) for name in ("padded", "packed", "engine")}
        told = ", ".join(f"{name} {gap:.1e}" for name, gap in found.items() if gap is not None)
        return f"{told} nats off the model's own log-probabilities of {self.tokens} tokens"


def self_check(
    policy: Policy, engine: RolloutEngine | None = None, packing: Packing = "auto"
) -> Gaps | None:
    """Compare `Policy.score` and ``engine`` with the model itself on two short texts.

    Random streams, modes and the counts of the engine are left as they were; its keys are dropped.

    Args:
        policy: The policy, where it will be used.
        engine: An engine of this process; ``None`` leaves it out.
        packing: As the update will pack.

    Returns:
        The gaps; ``None`` for a model whose own logits are not finite, which others name better.

    Raises:
        ValueError: A gap is too large, or the engine refuses the model.
    """
    model, texts, allowed = policy.causal_lm, _rows(policy, engine), _allowed(policy)
    gap: float | None = None
    with torch.random.fork_rng(devices=[]), evaluated(policy):
        trial = None
        if engine is not None:
            trial = _trusted(
                slot_model.TRIED, model, partial(_sampled, policy, engine, texts), allowed
            )
        rows, own, _ = trial or _Trial(texts, [_own(policy, row) for row in texts])
        wanted = [logprobs for logprobs, _ in own]
        if not torch.cat(wanted).isfinite().all():
            CHECKED.add(policy)
            return None
        padded = _held(policy, "padded", _gap(policy, _scores(policy, rows, packed=False), wanted))

        def pack() -> _Trial | None:
            if not attention.is_packed(packing, model):
                return None
            return _Trial(rows, own, _gap(policy, _scores(policy, rows, packed=True), wanted))

        in_rows = _trusted(attention.TRIED, model, pack, allowed) or pack()
        packed = None if in_rows is None else _held(policy, "packed", in_rows.gap)
        if engine is not None:
            gap = _held(policy, "engine", (trial or _tried(policy, engine, texts)).gap)
    CHECKED.add(policy)
    return Gaps(padded, packed, gap, allowed, len(texts[0]))


class _Trial(NamedTuple):
    """Token ids, what an engine drew included, and what is known of them.

    Attributes:
        rows: Rows of ids.
        own: Of each the model's own log-probabilities of its tokens from 1 on, and entropies.
        gap: Of who was tried.
    """

    rows: list[list[int]]
    own: list[tuple[Tensor, Tensor]]
    gap: float = math.nan


def _trusted(
    known: WeakSet[nn.Module],
    model: nn.Module,
    attempt: Callable[[], _Trial | None],
    allowed: float,
) -> _Trial | None:
    """The trial of a part that takes ``model`` for ``known``, where it stays if that was right.

    ``None`` where it was not: the part is then asked again, and tries the model in its own way.
    """
    was_known = model in known
    known.add(model)
    try:
        if (trial := attempt()) is not None and trial.gap <= allowed:
            return trial
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a family does that none before it did
        log.debug("self-check: %r", error)
    if not was_known:
        known.discard(model)
    return None


def _tried(policy: Policy, engine: Any, texts: list[list[int]]) -> _Trial:
    """The trial of an engine that could not be trusted; ``engine=auto`` has another cache."""
    trial = _sampled(policy, engine, texts)
    if not trial.gap <= _allowed(policy) and getattr(engine, "cache", None) == "auto":
        told = (
            "engine=auto samples over transformers' own caches, slower: its own are %.2g nats off"
        )
        log.warning(told, trial.gap)
        engine.cache = "plain"
        trial = _sampled(policy, engine, texts)
    return trial


def _held(policy: Policy, way: str, gap: float) -> float:
    """``gap``, which is allowed, or an error."""
    if gap <= _allowed(policy):  # NaN is not
        return gap
    where, instead = _WAYS[way]
    model = policy.causal_lm
    raise ValueError(
        f"self-check: {where}, log-probabilities are {gap:.3g} nats off those of "
        f"{type(model).__name__} ({model.config.name_or_path or 'a new model'}) itself; "
        f"{_allowed(policy):g} is allowed in {_kind(policy)}. What is learned from would be of "
        f"another policy. Type {instead}"
    )


def _rows(policy: Policy, engine: RolloutEngine | None) -> list[list[int]]:
    """Tokens of the texts: past the model's window where that costs little, the second shorter."""
    model: Any = policy.causal_lm
    config = policy.head.decoder.config
    wanted = _TOKENS + widest_window(config)
    device = model.device.type
    vocabulary = len(model.get_input_embeddings().weight)
    # Two rows, by the model itself, padded, packed and by the engine.
    cost = 16.0 * sum(parameter.numel() for parameter in model.parameters())
    if wanted * vocabulary > _LOGITS or wanted * cost > _OPERATIONS.get(device, 1e13):
        wanted = _TOKENS
    limits = (getattr(config, "max_position_embeddings", None), getattr(engine, "max_length", None))
    if room := [size for size in limits if isinstance(size, int)]:  # an engine draws twice
        wanted = min(wanted, min(room) - 2 * _DRAWN - _LEAST)
    rows = []
    for text, length in zip(TEXTS, (wanted, wanted // 3), strict=True):
        ids = policy.tokenizer(text, add_special_tokens=False).input_ids
        ids = [token for token in ids if token < vocabulary] or [0]
        rows.append([ids[i % len(ids)] for i in range(max(length, _LEAST))])
    return rows


def _own(policy: Policy, row: list[int]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a row's tokens from 1 on, and entropies, [L - 1] each, by the model."""
    ids = torch.tensor([row], device=policy.causal_lm.device)
    logits = policy.causal_lm(input_ids=ids, use_cache=False).logits[0, :-1]
    logprobs = logits.float().log_softmax(-1)
    entropies = torch.special.entr(logprobs.exp()).sum(-1)
    return logprobs.gather(1, ids[0, 1:, None])[:, 0], entropies


def _scores(policy: Policy, rows: list[list[int]], *, packed: bool) -> list[Tensor]:
    """The same by `Policy.score`."""
    lengths = [len(row) for row in rows]
    width = max(lengths)
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    inside = mask.clone()
    mask[:, 0] = False
    if packed:
        ids, mask = ids[inside][None], mask[inside][None]
    device = policy.causal_lm.device
    scored = policy.score(ids.to(device), mask.to(device), lengths=lengths if packed else None)
    return list(scored[0].split([length - 1 for length in lengths]))


def _sampled(policy: Policy, engine: RolloutEngine, texts: list[list[int]]) -> _Trial:
    """Two turns of an episode a text, the second with the keys of the first."""
    counts = dict(getattr(engine, "stats", {}))
    engine.sync(policy, 0)
    sampling = Sampling(temperature=1.0, max_new_tokens=_DRAWN)
    prompts = {f"self-check {i}": list(row) for i, row in enumerate(texts)}
    drawn: list[tuple[str, int, float, float | None]] = []
    try:
        for turn in range(2):
            engine.submit([Request(key, p, sampling, turn) for key, p in prompts.items()])
            for result in engine.poll(wait_all=True):
                places = range(start := len(prompts[result.key]), start + len(result.tokens))
                entropies: Sequence[float | None] = result.entropies or [None] * len(places)
                keys = [result.key] * len(places)
                drawn += zip(keys, places, result.logprobs, entropies, strict=True)
                prompts[result.key] = [*prompts[result.key], *result.tokens, *texts[0][:1]]
    finally:
        for key in prompts:
            engine.close(key)
        if counts:
            engine.stats.update(counts)  # type: ignore[attr-defined]
    own = {key: _own(policy, row) for key, row in prompts.items()}
    told, wanted = [], []
    for key, place, *values in drawn:
        for value, column in zip(values, own[key], strict=True):
            if value is not None:
                told.append(value)
                wanted.append(column[place - 1])
    gap = _gap(policy, [torch.tensor(told)], [torch.stack(wanted).cpu()])
    return _Trial([*prompts.values()], [*own.values()], gap)


def _gap(policy: Policy, found: list[Tensor], own: list[Tensor]) -> float:
    gap = (torch.cat(found) - torch.cat(own)).abs()
    return float(gap.max() if _is_full(policy) else gap.mean())


def _allowed(policy: Policy) -> float:
    return 1e-3 if _is_full(policy) else 0.1


def _kind(policy: Policy) -> str:
    kind = compute_dtype(policy.causal_lm.device, policy.causal_lm.dtype)
    return str(kind).removeprefix("torch.")


def _is_full(policy: Policy) -> bool:
    """Whether products are those of float32; TF32 has the mantissa of float16."""
    precise = torch.get_float32_matmul_precision() == "highest"
    return _kind(policy) in ("float32", "float64") and precise
