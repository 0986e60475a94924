"""The update against its peers: the head (log-prob, entropy, backward), and how rows share a pass.

1. Head: ours (``token_logprob_entropy``, in chunks) against a naive ``log_softmax`` and against
   TRL's ``selective_log_softmax`` with ``entropy_from_logits`` (extra ``bench``), forward and
   backward through both outputs, from hidden states. Time, peak extra memory, error against naive.
2. Rows: one update of a tiny policy on the same episodes as packed transcripts, as a row a turn
   with the full history, and as a row a turn with a window of two turns.
3. Packing: ragged transcripts, packed against padded.
4. Floor: the share of the head's time that its three matrix products take by themselves (logits,
   logits again in the backward pass, gradient): no head without a [tokens, vocabulary] tensor has
   fewer. Under 60 % on a GPU, a fused kernel is worth writing.
5. Growth of the head: exponents of time and memory as tokens and vocabulary double.

Seconds are CPU seconds on a CPU, which shared cores disturb less, and wall seconds on a GPU.

    python benchmarks/bench_update.py --json update.json
    python benchmarks/bench_update.py --full            # 1k to 16k response tokens
    python benchmarks/bench_update.py --device cuda --dtype bfloat16 --full
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from common import growth_exponent, print_growth, print_table, write_json
from meter import Meter, free_memory
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from aem_lightning.algorithms import ClippedLoss
from aem_lightning.functional import token_logprob_entropy
from aem_lightning.modules import Lora, Policy
from aem_lightning.modules.batching import trained_units
from aem_lightning.modules.memory import TokenBudget
from aem_lightning.modules.scoring import Objective
from aem_lightning.modules.update import accumulate_gradients
from aem_lightning.rollout import pack
from aem_lightning.types import RolloutBatch, Task, Trajectory, Turn

SHORT = 160_000_000  # logits of a case, where --full or --tokens do not ask for more
VOCABULARIES = [9_500, 19_000, 32_000, 76_000, 152_000]
FUSE_BELOW = 0.6  # of the floor: a fused kernel is worth writing
TINY = Qwen2Config(  # the quickstart's policy
    vocab_size=512,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
OPENING, OBSERVATION, RESPONSE = 80, 28, 12  # tokens
Head = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

# -------------------------------------------------------------------------------------------- head


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = (hidden @ weight.t()).float().log_softmax(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def trl_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """TRL's path from logits, with the gradient through the entropy."""
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    logits = (hidden @ weight.t()).float()
    # [1, T, V], as its trainers have it: one logsumexp for each row of the batch.
    chosen = selective_log_softmax(logits[None], targets[None])[0]
    return chosen, entropy_from_logits(logits)


HEADS: dict[str, Head] = {"naive": naive, "trl": trl_head}


def head_case(
    names: Sequence[str], tokens: int, vocabulary: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One entry a head: its costs, and the largest error of its gradient against naive."""
    results, expected = [], None
    for name in names:
        # TRL's leaves freed memory behind, which later heads would be given in place of their own.
        measure = partial(alone, measure_head) if name == "trl" else measure_head
        entry, gradient = measure(name, tokens, vocabulary, options)
        expected = gradient if name == "naive" else expected
        if expected is not None and gradient is not None:
            entry["gradient_error"] = float((gradient - expected).abs().max())
        results.append({"head": name, "tokens": tokens, "vocabulary": vocabulary, **entry})
    return results


def measure_head(
    name: str, tokens: int, vocabulary: int, options: argparse.Namespace
) -> tuple[dict[str, Any], Tensor | None]:
    """Costs and gradient of a head; only costs of the floor, and nothing where memory is short."""
    torch.set_num_threads(options.threads)
    device, kind = torch.device(options.device), getattr(torch, options.dtype)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, options.hidden, generator=generator).to(device, kind)
    weight = torch.randn(vocabulary, options.hidden, generator=generator).mul_(0.05)
    weight = weight.to(device, kind)
    targets = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
    few, leaf = (part.clone().requires_grad_() for part in (hidden[:8], hidden))
    meter = Meter(device)
    if name == "floor":
        hidden[:8] @ weight.t()  # kernels and threads wake up
        return rated(meter(partial(multiply, hidden, weight, options.chunk)), tokens), None
    # log-probabilities, their product with probabilities, and a gradient of each
    if name != "ours" and 6 * 4 * tokens * vocabulary > free_memory(device):
        return {"seconds": None, "extra_mib": None, "skipped": "memory"}, None
    head = partial(token_logprob_entropy, chunk=options.chunk) if name == "ours" else HEADS[name]
    forward_backward(head, few, weight, targets[:8])
    cost = meter(partial(forward_backward, head, leaf, weight, targets))
    assert leaf.grad is not None
    return rated(cost, tokens), leaf.grad.cpu()


def rated(cost: dict[str, float | None], tokens: int) -> dict[str, Any]:
    return {**cost, "tokens_per_second": tokens / float(cost["seconds"] or 1)}


def alone(measure: Callable[..., Any], *arguments: Any) -> Any:
    """Call it in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def multiply(hidden: Tensor, weight: Tensor, chunk: int) -> None:
    """The matrix products of our head, in its chunks, and nothing else."""
    for part in hidden.split(chunk):
        part @ weight.t()
        (part @ weight.t()) @ weight


def forward_backward(head: Head, hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    hidden.grad = None
    logprobs, entropies = head(hidden, weight, targets)
    (logprobs.sum() + 0.1 * entropies.sum()).backward()


def bench_heads(options: argparse.Namespace) -> list[dict[str, Any]]:
    names = ["naive", "ours", *(["trl"] if has_trl() else []), "floor"]
    results: list[dict[str, Any]] = []
    for vocabulary in options.vocabularies:
        for tokens in options.tokens:
            if not (options.short and tokens * vocabulary > SHORT):
                results += head_case(names, tokens, vocabulary, options)
    return results


def has_trl() -> bool:
    return find_spec("trl") is not None


# -------------------------------------------------------------------------------------------- rows


def episode(turns: int, seed: int, kind: str) -> Trajectory:
    """One episode as a transcript, or as a row a turn: ``history`` is whole, ``window`` has two."""
    rng = random.Random(seed)

    def draw(count: int) -> list[int]:
        return [rng.randrange(3, TINY.vocab_size) for _ in range(count)]

    opening = draw(OPENING)
    pairs = [(draw(OBSERVATION), draw(RESPONSE)) for _ in range(turns)]
    done = Trajectory(Task(str(seed)), group=0, copy=seed)
    for t, (observation, response) in enumerate(pairs):
        first = max(0, t - 2) if kind == "window" else 0
        past = [token for pair in pairs[first:t] for part in pair for token in part]
        row = [*opening, *past, *observation]
        start = len(row)
        row += response
        if kind == "transcript":
            done.rows = [row]
        else:
            done.rows.append(row)
        figures = [-1.0] * len(response)
        done.turns.append(
            Turn("", (), "", "", len(done.rows) - 1, start, figures, [1.0] * len(response))
        )
    return done


def tiny_policy(device: torch.device) -> Policy:
    torch.manual_seed(0)
    return lora_policy(Qwen2ForCausalLM(TINY), device)


def lora_policy(model: Qwen2ForCausalLM, device: torch.device) -> Policy:
    tokenizer: Any = None  # nothing is read or written
    return Policy(model.to(device), tokenizer, Lora(r=16, alpha=32)).to(device)


def update(policy: Policy, batch: RolloutBatch, *, packed: bool) -> None:
    """Forward and backward pass over the whole batch."""
    advantages = torch.linspace(-1, 1, batch.num_responses, device=batch.input_ids.device)
    loss = ClippedLoss(kl_coef=0.0)
    objective = Objective(policy, batch, advantages, loss, 1.0, on_policy=True, packed=packed)
    budget = TokenBudget(8192, packed=packed)
    micro = budget.cut(range(len(batch.row_length)), batch.row_length)
    units = trained_units(batch, "token").sum()
    accumulate_gradients(objective, micro, units, lambda name, value: None)


def time_update(
    policy: Policy, trajectories: list[Trajectory], device: torch.device, *, packed: bool = True
) -> dict[str, Any]:
    batch = pack(trajectories).to(device)
    cost = Meter(device)(partial(update, policy, batch, packed=packed))
    responses = int(batch.length.sum())
    return {
        "rows": len(batch.row_length),
        "tokens": int(batch.row_length.sum()),
        "response_tokens": responses,
        "response_tokens_per_second": responses / float(cost["seconds"] or 1),
        **cost,
    }


def bench_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    device = torch.device(options.device)
    policy = tiny_policy(device)
    time_update(policy, [episode(4, 0, "transcript")], device)
    results = []
    for turns in options.turns:
        for kind in ("transcript", "window", "history"):
            played = [episode(turns, seed, kind) for seed in range(options.episodes)]
            results.append({"rows_as": kind, "turns": turns, **time_update(policy, played, device)})
    return results


def bench_packing(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Ragged transcripts of up to ``max(turns)`` turns: few that are long, many that are short."""
    device = torch.device(options.device)
    policy, rng = tiny_policy(device), random.Random(0)
    longest = max(options.turns)
    counts = [max(1, int(longest * rng.random() ** 2)) for _ in range(16 * options.episodes)]
    played = [episode(count, seed, "transcript") for seed, count in enumerate(counts)]
    time_update(policy, played[:2], device)
    return [
        {"packing": name, **time_update(policy, played, device, packed=name == "packed")}
        for name in ("padded", "packed")
    ]


# ------------------------------------------------------------------------------------------ report


def ratios(heads: list[dict[str, Any]], rows: list[dict[str, Any]], packing: Any) -> dict[str, Any]:
    """Ours against each peer: times as fast, and times less memory."""
    found: dict[str, Any] = {}
    by_case = {(e["head"], e["vocabulary"], e["tokens"]): e for e in heads}
    for (name, vocabulary, tokens), peer in by_case.items():
        ours = by_case["ours", vocabulary, tokens]
        if name == "ours" or peer["seconds"] is None:
            continue
        if name == "floor":
            found[f"head_{vocabulary}_{tokens}_share_of_floor"] = peer["seconds"] / ours["seconds"]
            continue
        case = f"head_{vocabulary}_{tokens}_over_{name}"
        found[f"{case}_time"] = peer["seconds"] / ours["seconds"]
        if peer["extra_mib"] and ours["extra_mib"]:
            found[f"{case}_memory"] = peer["extra_mib"] / ours["extra_mib"]
    by_kind = {(entry["rows_as"], entry["turns"]): entry for entry in rows}
    for (kind, turns), entry in by_kind.items():
        if kind != "transcript":
            ours = by_kind["transcript", turns]
            found[f"transcript_over_{kind}_{turns}_time"] = entry["seconds"] / ours["seconds"]
            found[f"transcript_over_{kind}_{turns}_tokens"] = entry["tokens"] / ours["tokens"]
    padded, packed = packing
    found["packed_over_padded_time"] = padded["seconds"] / packed["seconds"]
    return found


def growth(heads: list[dict[str, Any]]) -> dict[str, float]:
    """Exponents of our head's costs; memory below a few MiB is noise, and fitted from there on."""
    ours = [entry for entry in heads if entry["head"] == "ours"]
    found = {}

    def fit(name: str, entries: list[dict[str, Any]], size: str) -> None:
        if len({entry[size] for entry in entries}) < 2:
            return
        sizes = [entry[size] for entry in entries]
        found[f"{name}_time"] = growth_exponent(sizes, [entry["seconds"] for entry in entries])
        if all(entry["extra_mib"] for entry in entries):
            memory = [max(8.0, entry["extra_mib"]) for entry in entries]
            found[f"{name}_memory"] = growth_exponent(sizes, memory)

    for vocabulary in dict.fromkeys(entry["vocabulary"] for entry in ours):
        part = [entry for entry in ours if entry["vocabulary"] == vocabulary]
        fit(f"response_tokens_at_vocabulary_{vocabulary}", part, "tokens")
    widest = max(entry["vocabulary"] for entry in ours)
    most = max(entry["tokens"] for entry in ours if entry["vocabulary"] == widest)
    fit("vocabulary", [entry for entry in ours if entry["tokens"] == most], "vocabulary")
    return found


def compare_short() -> dict[str, float]:
    """The ratios of rows, for the regression guard; the head's hang on how memory is handed out."""
    options = parsed(["--turns", "10"])
    return ratios([], bench_rows(options), bench_packing(options))


def parsed(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="1k to 16k tokens, longer rows")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES)
    parser.add_argument("--hidden", type=int, default=896, help="size of a hidden state")
    parser.add_argument("--chunk", type=int, default=512, help="of ours; training has 512")
    parser.add_argument("--turns", type=int, nargs="+", default=[10, 30, 50])
    parser.add_argument("--episodes", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of hidden states and vocabulary")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args(argv)
    options.short = not (options.full or options.tokens)
    options.tokens = options.tokens or (
        [1024, 2048, 4096, 8192, 16384] if options.full else [256, 512, 1024, 2048, 4096]
    )
    options.episodes = options.episodes or (8 if options.full else 1)
    return options


def main(argv: list[str] | None = None) -> None:
    options = parsed(argv)
    torch.set_num_threads(options.threads)
    heads, rows = bench_heads(options), bench_rows(options)
    packing = bench_packing(options)
    report = {
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "trl": "measured" if has_trl() else "not installed: pip install 'aem-lightning[bench]'",
        "head": heads,
        "rows": rows,
        "packing": packing,
        "ratios": ratios(heads, rows, packing),
        "growth": growth(heads),
    }
    show(report)
    if options.json:
        write_json(options.json, report)


def show(report: dict[str, Any]) -> None:
    columns = ["vocabulary", "tokens", "seconds", "tokens_per_second", "extra_mib"]
    print_table(
        f"Log-prob, entropy and backward (TRL: {report['trl']})",
        ["head", *columns, "gradient_error"],
        [[e["head"], *(e.get(c) for c in (*columns, "gradient_error"))] for e in report["head"]],
    )
    columns = ["turns", "rows", "tokens", "seconds", "response_tokens_per_second", "extra_mib"]
    print_table(
        "One update of a tiny policy on the same episodes",
        ["rows as", *columns],
        [[e["rows_as"], *(e[c] for c in columns)] for e in report["rows"]],
    )
    columns = columns[1:]
    print_table(
        "Ragged transcripts",
        ["rows are", *columns],
        [[e["packing"], *(e[c] for c in columns)] for e in report["packing"]],
    )
    print_table("Times as good as the peer", ["case", "ratio"], list(report["ratios"].items()))
    if report["growth"]:  # of one size there is none
        print_growth("Growth of our head's costs", report["growth"])
    if report["settings"]["device"] != "cpu":
        shares = [r for name, r in report["ratios"].items() if name.endswith("_share_of_floor")]
        verdict = "is" if min(shares) < FUSE_BELOW else "is not"
        print(
            f"The head reaches {min(shares):.0%} to {max(shares):.0%} of its matrix products' "
            f"rate; under {FUSE_BELOW:.0%} a fused kernel is worth writing: it {verdict}."
        )


if __name__ == "__main__":
    main()
