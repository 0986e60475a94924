"""The engine in this process: a HF causal LM over keys and values that are kept across turns.

Every episode owns a slot, a row of a cache. A request's prompt is compared with what the slot holds
and only the rest is computed, so an append-only transcript costs its new tokens and a window prompt
its changed tail. Equal prompts (the copies of a group at their first turn) are computed once and
copied; an episode that is new to its slot copies the longest beginning that any other slot holds.
The last token of a response is never fed alone: it comes in with the next prompt. Rows that finish
leave the batch.

The cache is a block of our own with an attention of our own (``engine=hf``), or, for models that
those do not compute, transformers' (``engine=plain``); ``engine=auto`` takes the first where it
gives what the model gives. Requests, seeds and results are the same. Adapters stay unmerged:
merging LoRA in half precision rounds most of an early update away.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from aem_lightning.beats import beat
from aem_lightning.rollout.auto_model import CacheKind, pick_model
from aem_lightning.rollout.engine import Request, Result, SyncablePolicy
from aem_lightning.rollout.finite import NotFiniteError
from aem_lightning.rollout.plain_model import PlainModel
from aem_lightning.rollout.sampling import allowed_tokens, draw, request_uniforms
from aem_lightning.rollout.shortage import in_stage
from aem_lightning.rollout.slot_model import SlotModel, waves
from aem_lightning.rollout.slots import Job, Slot, check_request, common_prefix
from aem_lightning.types import Count, Places

logger = logging.getLogger(__name__)


class SlotEngine:
    """Continuous batching of multi-turn episodes on one HF causal LM; a ``RolloutEngine``.

    ``stats`` counts tokens since the engine was made: ``prefilled`` (prompt tokens computed),
    ``reused`` (found in the slot), ``forked`` (copied from another slot), ``tokens`` (sampled);
    and ``decode_steps`` and ``evicted`` (idle episodes that lost their slot to a waiting one).

    Args:
        slots: Episodes that can be open at once. More may be submitted; they wait for a slot.
        max_length: Most tokens of a prompt with its response. Memory is that of the open episodes,
            each as long as the longest so far (`slot_cache.block_shape`).
        bucket: Attention reads are rounded up to a multiple of it.
        cuda_graphs: ``auto`` captures decode steps as CUDA graphs on a GPU (`cuda_graphs`); ``off``
            never does. Of no use to transformers' caches.
        cache: Where keys and values are: ``slots``, a block of our own; ``plain``, transformers'
            caches, whose memory grows with what the open episodes hold; ``auto``, see `pick_model`.

    Raises:
        ValueError: A number under 1, or an unknown choice.
    """

    def __init__(
        self,
        slots: Places = 64,
        max_length: Count = 2048,
        bucket: Count = 128,
        cuda_graphs: Literal["auto", "off"] = "auto",
        cache: CacheKind = "slots",
    ) -> None:
        if cuda_graphs not in ("auto", "off"):
            raise ValueError(
                f"engine.cuda_graphs={cuda_graphs!r} is unknown; allowed: engine.cuda_graphs=auto, "
                "engine.cuda_graphs='off' (YAML reads a bare off as false)"
            )
        if cache not in get_args(CacheKind):
            allowed = ", ".join(f"engine.cache={kind}" for kind in get_args(CacheKind))
            raise ValueError(f"engine.cache={cache!r} is unknown; allowed: {allowed}")
        for name, value in (("slots", slots), ("max_length", max_length), ("bucket", bucket)):
            if value < 1:
                raise ValueError(f"engine.{name}={value} is not allowed: give a whole number >= 1")
        self.slots = slots
        self.max_length = max_length
        self.bucket = bucket
        self.cuda_graphs = cuda_graphs
        self.cache = cache
        self.version = -1
        self.stats = dict.fromkeys(
            ("prefilled", "reused", "forked", "tokens", "decode_steps", "evicted"), 0
        )
        self._model: SlotModel | PlainModel | None = None
        self._clock = itertools.count(1)
        self._forget()

    def _forget(self) -> None:
        self._slots = [Slot() for _ in range(self.slots)]
        self._owner: dict[str, int] = {}
        self._waiting: dict[str, Job] = {}
        # Rows that are drawing, ascending, and the logits of their next token, [len(running), V].
        self._running: list[int] = []
        self._logits = torch.empty(0)

    def sync(self, policy: SyncablePolicy, version: int) -> None:
        """Take the policy's present weights, drop every cached key and value, free every slot.

        Raises:
            RuntimeError: Requests are unfinished; they would be drawn from two policies.
            ValueError: ``cache="slots"``, and the model is of a kind that it would compute wrongly.
            MemoryError: Not even the first keys and values fit beside the model.
        """
        unfinished = len(self._waiting) + len(self._running)
        if unfinished:
            raise RuntimeError(
                f"sync to version {version} with {unfinished} unfinished requests: "
                "call poll(wait_all=True) or close() them first"
            )
        shape = self.slots, self.max_length, self.bucket
        model = self._model = pick_model(self.cache, policy.causal_lm, self._model, shape)
        if isinstance(model, SlotModel):
            model.prepare(graphs=self.cuda_graphs != "off")
        self.version = version
        self._forget()

    def release(self) -> bool:
        """Drop model, cache and graphs until the next `sync`; whether a GPU's memory is freed."""
        model, self._model = self._model, None
        self._forget()
        return model is not None and model.device.type == "cuda"

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests; at most one unfinished request a key.

        Raises:
            RuntimeError: ``sync`` was never called.
            ValueError: An empty prompt, one that does not fit, or a key with an unfinished request.
                Nothing of the call is queued then.
        """
        self._policy()
        requests = list(requests)
        busy = {*self._waiting, *(self._slots[row].key for row in self._running)}
        for request in requests:
            check_request(request, busy, self.max_length)
            busy.add(request.key)
        for request in requests:
            uniforms = request_uniforms(request.seed, request.sampling.max_new_tokens)
            self._waiting[request.key] = Job(request, next(self._clock), uniforms)

    def poll(self, wait_all: bool = False, at_least: int = 1) -> list[Result]:
        """Run until a request has finished and return what has, in the order of submission.

        What is returned depends on what was submitted and when, and never on how long it took.

        Args:
            wait_all: Run until every submitted request has finished.
            at_least: Run until so many have finished.

        Returns:
            Finished responses; fewer than ``at_least`` only when no more were submitted.

        Raises:
            RuntimeError: ``sync`` was never called.
            NotFiniteError: The model gave logits that are not finite.
            ShortOfMemoryError: Memory ran out in a prefill or a decode step.
        """
        done: list[tuple[int, Result]] = []
        with self._policy().sampling_mode():
            while (self._waiting or self._running) and (wait_all or len(done) < at_least):
                with in_stage("prefill", concurrency=self.slots, max_context=self.max_length):
                    self._admit()
                with in_stage("decode", concurrency=self.slots, max_context=self.max_length):
                    done += self._step()
        return [result for _, result in sorted(done, key=lambda pair: pair[0])]

    def close(self, key: str) -> None:
        """End an episode: its slot is free, and an unfinished request of it is dropped.

        A key without a slot (never admitted, evicted, or dropped by ``sync``) is no error.
        """
        self._waiting.pop(key, None)
        row = self._owner.pop(key, None)
        if row is None:
            return
        if row in self._running:
            keep = [index for index, other in enumerate(self._running) if other != row]
            self._running = [self._running[index] for index in keep]
            self._logits = self._logits[keep]
        # The ids stay: the next owner may share a head with them.
        self._slots[row].key = None
        self._slots[row].job = None
        if isinstance(self._model, SlotModel) and not self._owner and not self._waiting:
            self._model.cache.trim()

    def state_dict(self, most: int) -> dict[str, Any] | None:
        """What the cache holds; ``None`` above ``most`` bytes, or among unfinished requests."""
        if self._model is None or self._waiting or self._running:
            return None
        slots = [[slot.key, slot.ids, slot.used] for slot in self._slots]
        held = self._model.cache.held(max(len(slot.ids) for slot in self._slots), most)
        return {"clock": next(self._clock), "slots": slots, "tensors": held} if held else None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on, bit by bit, as an engine of the same policy and settings left off."""
        self._clock = itertools.count(state["clock"])
        self._slots = [Slot(key, ids=list(ids), used=used) for key, ids, used in state["slots"]]
        self._owner = {slot.key: row for row, slot in enumerate(self._slots) if slot.key}
        self._policy().cache.fill(state["tensors"], self._policy().device)

    def _place(self) -> list[int]:
        """Give waiting jobs a slot, in order of submission; the rows that have a new one."""
        placed: list[int] = []
        free = [row for row in range(self.slots) if self._slots[row].key is None]
        free.reverse()
        starved = not self._running and not any(key in self._owner for key in self._waiting)
        for key in list(self._waiting):
            row = self._owner.get(key)
            if row is None and free:
                row = free.pop()
            if row is None and starved:
                row = self._evict(placed)
            if row is None:
                continue
            self._slots[row].is_new = self._slots[row].key != key
            self._owner[key] = row
            self._slots[row].key = key
            self._slots[row].job = self._waiting.pop(key)
            placed.append(row)
        return sorted(placed)

    def _evict(self, placed: Sequence[int]) -> int | None:
        """The row of the longest idle episode, taken from it.

        Only where nothing else can run: an episode that will soon ask for its next turn would have
        to be computed anew.
        """
        idle = [row for row in range(self.slots) if row not in placed]
        if not idle:
            return None
        row = min(idle, key=lambda candidate: self._slots[candidate].used)
        if self.stats["evicted"] == 0:
            logger.warning(
                "more episodes are open than engine.slots=%s: prompts are computed again; raise it",
                self.slots,
            )
        self.stats["evicted"] += 1
        self.close(self._slots[row].key or "")
        return row

    def _compact(self) -> list[int]:
        """Move the running rows to the front: attention then reads a view of the cache, not a copy.

        Returns:
            For each running row, now ascending, its index before.
        """
        count = len(self._running)
        taken = set(self._running)
        holes = [row for row in range(count) if row not in taken]
        strays = [row for row in self._running if row >= count]
        moved = dict(zip(strays, holes, strict=True))
        if moved:
            tokens = max(len(self._slots[row].ids) for row in (*holes, *strays))
            self._policy().cache.copy([*strays, *holes], [*holes, *strays], tokens)
            for stray, hole in moved.items():
                self._slots[hole], self._slots[stray] = self._slots[stray], self._slots[hole]
                for row in (hole, stray):
                    if (key := self._slots[row].key) is not None:
                        self._owner[key] = row
        rows = [moved.get(row, row) for row in self._running]
        order = sorted(range(count), key=rows.__getitem__)
        self._running = sorted(rows)
        return order

    def _admit(self) -> None:
        """Compute the prompts of the requests that have got a slot and let them join the batch."""
        rows = self._place()
        if not rows:
            return
        leaders: dict[tuple[int, ...], int] = {}
        leader_of: dict[int, int] = {}
        for row in rows:
            leader_of[row] = leaders.setdefault(tuple(self._job(row).request.prompt), row)
        logits = self._prefill(list(leaders.values()))
        for row in rows:
            if leader_of[row] != row:
                self._fork(leader_of[row], row)
        fresh = torch.stack([logits[leader_of[row]] for row in rows])
        self._logits = torch.cat([self._logits, fresh]) if self._running else fresh
        self._running = self._running + rows
        self._logits = self._logits[self._compact()]

    def _prefill(self, rows: list[int]) -> dict[int, Tensor]:
        """Compute what the slots do not hold of their prompts; next-token logits [V] by row."""
        rest: dict[int, list[int]] = {}
        for row in rows:
            slot, job = self._slots[row], self._job(row)
            prompt = list(job.request.prompt)
            borrowed = self._borrow(row, prompt) if slot.is_new else 0
            job.reused = self._shared(row, prompt)
            slot.ids = prompt[: job.reused]
            rest[row] = prompt[job.reused :]
            self.stats["reused"] += job.reused - borrowed
            self.stats["prefilled"] += len(rest[row])
        logits: dict[int, Tensor] = {}
        for wave in waves({row: len(tokens) for row, tokens in rest.items()}):
            logits.update(zip(wave, self._forward(wave, [rest[row] for row in wave]), strict=True))
        return logits

    def _borrow(self, row: int, prompt: list[int]) -> int:
        """Copy the longest beginning of ``prompt`` that another slot holds; tokens gained by it.

        A gain of less than a bucket is not worth the copy.
        """
        self._slots[row].is_new = False
        held = [self._shared(other, prompt) for other in range(self.slots)]
        best = max(range(self.slots), key=held.__getitem__)
        gain = held[best] - held[row]
        if gain < self.bucket:
            return 0
        self._policy().cache.copy([best], [row], held[best])
        self._slots[row].ids = prompt[: held[best]]
        self.stats["forked"] += gain
        return gain

    def _shared(self, row: int, prompt: list[int]) -> int:
        """Tokens of ``prompt`` that the slot holds and can go on from, one less than all at most.

        One token is always computed: the next token's logits come out of it.
        """
        ids = self._slots[row].ids
        shared = common_prefix(ids, prompt[:-1])
        goes_on = shared == len(ids) or self._policy().cache.crops(row, shared)
        return shared if goes_on else 0

    def _fork(self, source: int, target: int) -> None:
        """Copy a computed prompt to another slot."""
        prompt = list(self._job(target).request.prompt)
        self._policy().cache.copy([source], [target], len(prompt))
        self._slots[target].ids = prompt
        self._slots[target].is_new = False
        self._job(target).reused = len(prompt)
        self.stats["forked"] += len(prompt)

    def _step(self) -> list[tuple[int, Result]]:
        """Draw a token for every running row; finished rows leave, the others are fed theirs."""
        beat("decode_step")
        jobs = [self._job(row) for row in self._running]
        temperature = torch.tensor([job.request.sampling.temperature for job in jobs])
        uniforms = torch.tensor(
            [job.uniforms[len(job.tokens)] for job in jobs], dtype=torch.float64
        )
        device = self._logits.device
        choices = [None if job.cursor is None else job.cursor.allowed() for job in jobs]
        allowed = allowed_tokens(choices, self._logits)
        drawn = draw(self._logits, temperature.to(device), uniforms.to(device), allowed)
        # One transfer for all three; float64 holds token ids and float32 values exactly.
        table = torch.stack([column.double() for column in drawn]).tolist()
        self.stats["decode_steps"] += 1
        self.stats["tokens"] += len(jobs)
        done, stay = [], []
        for row, job, token, logprob, entropy in zip(self._running, jobs, *table, strict=True):
            if not math.isfinite(entropy):
                raise NotFiniteError(
                    f"{job.request.key}: the policy's logits are not finite at token "
                    f"{len(job.tokens)} of the response (entropy {entropy})",
                    stage="rollout",
                    tensor="logits",
                    advice="a weight is NaN or infinite, or half precision overflows. To lower "
                    "optimizer.lr=... helps where an update did it; a model that came so needs "
                    "another policy.model=..., or policy.dtype=float32",
                    kept={"input_ids": torch.tensor([[*job.request.prompt, *job.tokens]])},
                )
            job.take(int(token), logprob, entropy)
            if reason := job.finish_reason():
                done.append((job.order, job.result(reason, self.version)))
                self._slots[row].job = None
                self._slots[row].used = next(self._clock)
            else:
                stay.append(row)
        self._running = stay
        if stay:
            self._compact()
            last = [[self._job(row).tokens[-1]] for row in self._running]
            self._logits = self._forward(self._running, last)
        return done

    def _forward(self, rows: Sequence[int], chunks: Sequence[list[int]]) -> Tensor:
        """Append a chunk to each row (ascending); logits after the last of each, [b, V]."""
        starts = [len(self._slots[row].ids) for row in rows]
        logits = self._policy().forward(rows, starts, chunks)
        for row, chunk in zip(rows, chunks, strict=True):
            self._slots[row].ids.extend(chunk)
        return logits

    def _policy(self) -> SlotModel | PlainModel:
        if self._model is None:
            raise RuntimeError("the engine has no policy yet: call sync(policy, version) first")
        return self._model

    def _job(self, row: int) -> Job:
        job = self._slots[row].job
        assert job is not None, f"slot {row} has nothing to run"
        return job
