"""The pieces, in the order in which they are to tell of a fault."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any

import torch

from aem_lightning.gpu_check.decoding import graphs
from aem_lightning.gpu_check.piece import Check, Figures, Piece
from aem_lightning.gpu_check.runs import four_bits, paper, quickstart, run_script
from aem_lightning.gpu_check.shapes import random_model
from aem_lightning.modules.memory import TokenBudget
from aem_lightning.rollout import SlotEngine
from aem_lightning.rollout.slot_cache import check_room

PACKAGES = ("torch", "lightning", "transformers", "peft", "accelerate", "bitsandbytes", "textworld")
# Beside those marked `gpu`: what a kernel of another machine can break.
TESTS = ("slot_engine", "cuda_graphs", "packed_attention", "functional_logprob", "policy")
# Of the three matrix products that any head has to do: under it a fused kernel is worth writing.
FUSE_BELOW = 0.6
SHARE = 0.4  # of the memory, in the drill


def machine(check: Check) -> Figures:
    """Versions and the device; then the tests marked ``gpu``, and those of the parts below."""
    unit = check.root / "tests" / "unit"
    marked = [str(p) for p in sorted(unit.glob("test_*.py")) if "mark.gpu" in p.read_text("utf-8")]
    files = [str(unit / f"test_{name}.py") for name in TESTS]
    plain = ["-m", "not gpu and not slow and not soak"]
    runs = {"gpu": [*marked, "-m", "gpu"], "parts": [*files, *plain]}
    if check.small:  # that pytest runs at all; the suite has its own command
        runs = {"parts": [str(unit / "test_cuda_graphs.py"), *plain]}
    ended = {name: tests(check, name, words) for name, words in runs.items()}
    failed = [f"tests of {name}: {said}" for name, (ok, said) in ended.items() if not ok]
    return {
        "red": "; ".join(failed) or None,
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in PACKAGES},
        "tests": {name: said for name, (_, said) in ended.items()},
        **({} if check.small else device()),
    }


def tests(check: Check, name: str, words: list[str]) -> tuple[bool, str]:
    """Whether pytest is content with ``words``, and its last line."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    done = subprocess.run(command, cwd=check.root, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    (check.folder / f"tests_{name}.log").write_text(said, encoding="utf-8")
    return done.returncode == 0, (said.strip().splitlines() or ["nothing"])[-1]


def installed(name: str) -> str | None:
    """The version of a package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def device() -> Figures:
    """What torch says of the GPU."""
    free, total = torch.cuda.mem_get_info()
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "free_gib": free / 2**30,
        "total_gib": total / 2**30,
    }


def head(check: Check) -> Figures:
    """Log-probabilities, entropies and their backward pass, as a share of their floor."""
    folder = check.folder / "runs" / "head"
    found = folder / "update.json"
    small = ["--tokens", "64", "--vocabularies", "512", "--hidden", "32", "--turns", "2"]
    real = ["--device", "cuda", "--dtype", "bfloat16", "--turns", "10"]
    words = ["bench_update.py", *(small if check.small else real), "--json", str(found)]
    run_script(check, [f"benchmarks/{words[0]}", *words[1:]], folder)
    ratios: dict[str, float] = json.loads(found.read_text(encoding="utf-8"))["ratios"]
    shares = {name: value for name, value in ratios.items() if name.endswith("share_of_floor")}
    return {
        "red": None if shares else "bench_update.py measured no floor",
        "share_of_floor": shares,
        "worth_fusing": min(shares.values(), default=0.0) < FUSE_BELOW,
    }


def memory(check: Check) -> Figures:
    """A drill: a micro-batch that is too big is halved; too large a concurrency is told in words.

    On a GPU at a share of its memory.
    """
    if not check.small:
        torch.cuda.set_per_process_memory_fraction(SHARE)
    model = random_model("tiny" if check.small else "1.5b", check.device)
    budget = TokenBudget(200_000, packed=True)
    lengths = torch.full((200,), 1000)
    budget.run(partial(_forward, model, check), range(200), lengths)
    told = _refused(model, check)
    wrong = "the budget of a micro-batch did not shrink" if budget.tokens == 200_000 else None
    if "concurrency=" not in told:
        wrong = f"too many slots end with {told!r}"
    return {"red": wrong, "micro_batch_tokens": budget.tokens, "told": told}


def _forward(model: Any, check: Check, micro: Any) -> None:
    """Every micro-batch through the whole model, with a tensor of all its logits."""
    for rows in micro:
        tokens = 1000 * len(rows)
        if check.small and tokens > 60_000:
            raise torch.OutOfMemoryError("CUDA out of memory: as a GPU says it")
        if not check.small:
            ids = torch.ones(1, tokens, dtype=torch.long, device=check.device)
            model(input_ids=ids, use_cache=False).logits.float().exp().sum().backward()
            model.zero_grad()


def _refused(model: Any, check: Check) -> str:
    """What an engine says to more slots than memory holds."""
    engine = SlotEngine(slots=65536, max_length=32768)
    try:
        if check.small:  # a CPU's memory is paged, and no engine looks at it
            check_room(1024, engine.slots, engine.max_length, free=2**30)
        engine.sync(SimpleNamespace(causal_lm=model), 0)
    except MemoryError as error:
        return str(error)
    finally:
        engine.release()
    return "no error"


PIECES = (
    Piece("machine", "versions, the device, and the tests that need one", machine),
    Piece("graphs", "captured decode steps against eager ones, 1.5B", graphs),
    Piece("quickstart", "the quickstart twice with one seed", quickstart),
    Piece("paper", "an iteration of the paper's ALFWorld run, 1.5B", paper),
    Piece(
        "paper_without_cudnn",
        "the same, without cuDNN's attention",
        paper,
        {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"},
    ),
    Piece(
        "paper_without_casts", "the same, without PEFT's input casts", partial(paper, casts=False)
    ),
    Piece("head", "the head's share of its floor", head),
    Piece("four_bits", "an update of the 7B shape in nf4", four_bits),
    Piece("memory", "memory that runs out", memory),
)
