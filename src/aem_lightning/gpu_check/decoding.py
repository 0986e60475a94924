"""Decoding at a real shape: captured steps against eager ones, and the rate of the memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aem_lightning.gpu_check.piece import Check, Figures
from aem_lightning.gpu_check.shapes import random_model
from aem_lightning.modules import Lora, Policy
from aem_lightning.rollout.cuda_graphs import DecodeGraphs
from aem_lightning.rollout.slot_cache import bytes_of_token
from aem_lightning.rollout.slot_model import SlotModel

# |Δ log-prob| that rounding to bfloat16 in kernels of other shapes may leave; a wrong position or
# mask moves it by whole nats.
TOLERANCE = 0.05
MIB = 2**20


def graphs(check: Check) -> Figures:
    """Greedy decoding with and without graphs: equal ids; then the cost of a step of each."""
    rows, new, prompt = (4, 8, 24) if check.small else (16, 64, 512)
    reads = (64, 128) if check.small else (1280, 2560)
    batches = (2, 4) if check.small else (16, 64, 128)
    tokenizer: Any = None  # nothing is read or written
    model = random_model("tiny" if check.small else "1.5b", check.device)
    causal_lm = Policy(model, tokenizer, Lora(r=64, alpha=128)).causal_lm
    length = max(reads) + 1  # the last place is the bin
    eager, captured = (SlotModel(causal_lm, max(batches), length, 64) for _ in range(2))
    captured.cache = eager.cache  # the block is big
    eager.few_shapes = captured.few_shapes = False  # graphs have shapes of their own
    captured.graphs = DecodeGraphs(max(batches), length - 1, repeat if check.small else None)
    before = reserved(check)
    with torch.autocast(check.device, torch.bfloat16), captured.sampling_mode():
        ids, logprobs = decode(eager, rows, prompt, new)
        ids_of_graphs, logprobs_of_graphs = decode(captured, rows, prompt, new, follow=ids)
        steps = {}
        for batch in batches:
            for read in reads:
                case = f"{batch} rows, {read} read"
                starts = [read - 1] * batch
                steps[case] = {
                    "eager_ms": 1000 * seconds_a_step(eager, starts, check),
                    "graph_ms": 1000 * seconds_a_step(captured, starts, check),
                }
        number, taken = len(captured.graphs), reserved(check) - before
        ragged = ragged_steps(captured, max(batches), max(reads), check)
    apart = float((logprobs - logprobs_of_graphs).abs().max())
    same = bool(torch.equal(ids, ids_of_graphs))
    wrong = captured.graphs.is_broken and "the decode step cannot be captured: see the log"
    wrong = wrong or (not same and apart > TOLERANCE and "graphs decode other ids than eager steps")
    wrong = wrong or (apart > TOLERANCE and f"log-probabilities differ by {apart:.3f}")
    weights = sum(parameter.nbytes for parameter in causal_lm.parameters())
    rate = bytes_a_second(check)
    token = bytes_of_token(model.config, torch.bfloat16)
    return {
        "red": wrong or None,
        "same_ids": same,
        "max_logprob_difference": apart,
        "graphs": number,
        "reserved_mib_of_graphs": taken / MIB,
        "steps": steps,
        "ragged": ragged,
        "weights_gib": weights / 2**30,
        "roof_ms": 1000 * weights / rate,
        "engines": {
            f"{batch} rows, {read} read": expected(
                batch,
                min(steps[f"{batch} rows, {read} read"].values()) / 1000,
                (weights + batch * read * token) / rate,
            )
            for batch in batches
            for read in reads
        },
    }


def expected(rows: int, seconds: float, floor: float) -> Figures:
    """What an engine decodes, and what none can pass, in tokens a second.

    A step has to read all weights, and the keys and values of every row: the ``floor`` of its time.
    A server that batches well, as vLLM's, comes near it; it needs memory, or a GPU, of its own.

    Args:
        rows: Of the batch.
        seconds: That a step of ``engine=hf`` took.
        floor: Seconds that the reading takes.
    """
    return {
        "hf_tokens_per_s": rows / seconds,
        "vllm_at_most_tokens_per_s": rows / floor,
        "hf_share": floor / seconds,
    }


def repeat(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """What a graph does, without one: the same step over the same buffers, again and again."""
    step()
    return step


def decode(
    model: SlotModel, rows: int, prompt: int, new: int, follow: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The most likely ids after random prompts, and log-probabilities, both [rows, new].

    With ``follow`` [rows, new] these are fed, and theirs are the log-probabilities: one tie that is
    broken otherwise does not lead everything after it astray.
    """
    generator = torch.Generator().manual_seed(0)
    config: Any = model.causal_lm.config
    vocabulary = int(config.vocab_size)
    chunks = torch.randint(vocabulary, (rows, prompt), generator=generator).tolist()
    ids, logprobs, starts = [], [], [0] * rows
    for step in range(new):
        scores = model.forward(range(rows), starts, chunks).log_softmax(-1).cpu()
        ids.append(scores.argmax(-1))
        fed = ids[-1] if follow is None else follow[:, step]
        logprobs.append(scores.gather(1, fed[:, None])[:, 0])
        starts = [start + len(chunk) for start, chunk in zip(starts, chunks, strict=True)]
        chunks = fed[:, None].tolist()
    return torch.stack(ids, 1), torch.stack(logprobs, 1)


def ragged_steps(model: SlotModel, rows: int, read: int, check: Check) -> Figures:
    """A step of which one row holds ``read`` tokens and the others an eighth of that.

    By the kernel that stops at a row's own end, where there is one, and under a mask, by which all
    read as far as the longest.
    """
    starts = [read - 1] + [read // 8] * (rows - 1)
    found: Figures = {"by_a_kernel": model.kernel is not None}
    for name in ("used_ms", "masked_ms"):
        found[name] = 1000 * seconds_a_step(model, starts, check)
        model.kernel = None
        if model.graphs is not None:
            model.graphs.clear()
    return found


def seconds_a_step(model: SlotModel, starts: list[int], check: Check) -> float:
    """Wall seconds of a decode step of rows that hold ``starts``, the first ones left out."""
    count = 2 if check.small else 20
    rows, chunks = range(len(starts)), [[1]] * len(starts)
    for _ in range(2):
        model.forward(rows, starts, chunks)
    wait(check)
    start = time.perf_counter()
    for _ in range(count):
        model.forward(rows, starts, chunks)
    wait(check)
    return (time.perf_counter() - start) / count


def bytes_a_second(check: Check) -> float:
    """The rate at which the device's memory is read, by copying a big block."""
    block = torch.empty(MIB if check.small else 1024 * MIB, dtype=torch.uint8, device=check.device)
    other = block.clone()
    wait(check)
    start = time.perf_counter()
    for _ in range(10):
        other.copy_(block)
    wait(check)
    return 10 * 2 * block.nbytes / (time.perf_counter() - start)


def wait(check: Check) -> None:
    """Until the device has done what it was given."""
    if not check.small:
        torch.cuda.synchronize()


def reserved(check: Check) -> int:
    """Bytes that torch holds of the device."""
    return 0 if check.small else torch.cuda.memory_reserved()
