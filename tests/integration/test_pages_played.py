"""Every command of the how-tos as a reader types it, in small: on request, `-m soak`."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from invariants.test_docs import DOCS, commands
from packages import EXAMPLES, installed
from runs import ROOT
from unit.tiny_play import byte_tokenizer, make_policy

PAGES = [DOCS / "index.md", DOCS / "extending.md", *sorted((DOCS / "howto").glob("*.md"))]
# What other tests play, or what cannot be had on a machine without the thing named.
ELSEWHERE = {
    "make": "the Makefile's tests",
    "pip": "an installation",
    "aem-train": "make wheel-test",
    "aem-eval": "make wheel-test",
    "aem-view": "make wheel-test",
    "aem-analysis": "make wheel-test",
    "aem-configs": "make wheel-test",
    "torchrun": "tests/invariants/test_machines.py",
    "sbatch": "SLURM",
    "vllm": "make test-vllm",
    "engine=vllm": "make test-vllm",
    "policy=api": "tests/integration/test_api_evaluation.py",
    "aem_lightning.analysis": "tests/integration/test_analysis_commands.py",
    'overrides=["datamodule._target_=my_package.MyDataModule"]': "tests/unit/test_trust.py",
    "policy.model=/models/merged": "tests/unit/test_evaluate_models.py",
    "adapter=/models/adapter": "tests/unit/test_evaluate_models.py",
    "--serve": "tests/unit/test_viewer.py",
    "aem_lightning.runner.serve": "make test-adapters",
    "datamodule=reasoning_gym": "make test-adapters",
    "scripts/plot_learning_curve.py": "tests/unit/test_plot_learning_curve.py",
    "logger=wandb": "the extra wandb",
    "logger=many": "the extras wandb and mlflow",
    "trainer=gpu": "a GPU",
    "trainer=ddp": "GPUs",
    "policy=qwen2_5_7b_qlora": "a GPU",
    "datamodule.dataset=openai/gsm8k": "a network",
    "experiment=webshop": "WebShop's files",
    "experiment=alfworld_smollm2": "make model, and a night",
    "aem_lightning.hub": "tests/unit/test_hub.py",
    "spacy": "a network",
}
PACKAGES = ("arithmetic", "key_and_door", "own_parts")
FOREIGN = {"export", "git", "cd", "source", "hf", "alfworld-download"}
TEMPLATE = (ROOT / "tests" / "templates" / "qwen2_5.jinja").read_text(encoding="utf-8")
SMALL = ["debug=fast", "preflight=false", "trainer.accelerator=cpu", "micro_batch_tokens=2048"]
# Of the run that pages look at: a dozen episodes, some of them won, and a validation.
LOOKED_AT = [
    *("callbacks.transcripts.every=1", "tasks_per_iteration=6", "group_size=4", "max_turns=14"),
    *("policy.warm_start.demonstrations=300", "policy.warm_start.epochs=5"),
]
# A page's own files, by the name that its text gives them.
FILES = {
    "my_file.py": """
        import random

        def my_reward(row, answer, calls=()):
            return float(answer.strip() == row["answer"])

        def search(words: str) -> str:
            '''Look words up.

            Args:
                words: What to look for.
            '''
            return words

        def read(page: int) -> str:
            '''Read a page.

            Args:
                page: Its number.
            '''
            return str(page)
    """,
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder: a small model, the files of the pages, and a run to look at."""
    desk = tmp_path_factory.mktemp("desk")
    for name in ("key_and_door", "own_parts"):
        with installed(name, desk / "site"):
            pass
    with torch.random.fork_rng(devices=[]):
        make_policy(byte_tokenizer(TEMPLATE), lora=False).save_model(desk / "model")
    rows = [{"question": f"{n} ?", "answer": str(n)} for n in range(40)]
    for name in ("questions.jsonl", "tasks.jsonl"):
        (desk / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    says = [{"role": "user", "content": "where ?"}, {"role": "assistant", "content": "look"}]
    (desk / "chats.jsonl").write_text(json.dumps({"messages": says}) + "\n")
    for page, name, first in (
        ("single-turn.md", "sums.py", "AgentDataModule"),
        ("new-environment.md", "guess.py", "AgentDataModule"),
        ("tools.md", "my_file.py", "def my_agent"),
    ):
        blocks = re.findall(r"```python\n(.*?)```", (DOCS / "howto" / page).read_text(), re.DOTALL)
        own = "\n".join(line[8:] for line in FILES.get(name, "").splitlines())
        (desk / name).write_text(own + next(block for block in blocks if first in block))
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "extending.md").read_text(), re.DOTALL)
    (desk / "my_parts.py").write_text("\n\n".join(blocks))
    play(desk, ["python", "train.py", "experiment=quickstart", *LOOKED_AT])
    return desk


def play(desk: Path, words: list[str]) -> None:
    """Type ``words`` in the folder ``desk``, a training in small."""
    places = [desk, desk / "site", *(EXAMPLES / name for name in PACKAGES)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places))}
    env |= {"AEM_LIGHTNING_ROOT": str(desk), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    runs = sorted((desk / "logs" / "quickstart").glob("*-*"))  # the first is the one looked at
    if words[1] == "train.py" and "experiment=quickstart" in words:
        # One warm start for all: a checkpoint's adapters belong to the model that its own made.
        warm = [word for word in LOOKED_AT if word.startswith("policy.warm_start.")]
        words = [*words, *(word for word in warm if word not in words)]
    words = [word.replace("somewhere", runs[0].name) if runs else word for word in words]
    words = [word.replace("file://examples", f"file://{ROOT}/examples") for word in words]
    if words[1] in ("train.py", "eval.py"):
        words = [*words[:1], str(ROOT / words[1]), *small(desk, words[1], words[2:])]
    first = (
        [sys.executable] if words[0] == "python" else [str(Path(sys.executable).parent / words[0])]
    )
    done = subprocess.run(
        [*first, *words[1:]], cwd=desk, env=env, capture_output=True, text=True, timeout=300
    )
    said = f"{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
    assert done.returncode == 0, f"{shlex.join(words)}\n{said}"


def small(desk: Path, script: str, words: list[str]) -> list[str]:
    """``words`` with a model of this folder for any other, and games that are made here."""
    if script == "eval.py":
        return words
    model = f"policy.model={desk / 'model'}"
    experiment = next((word for word in words if word.startswith("experiment=alfworld")), None)
    hub = any(word.startswith(("policy=qwen", "policy.model=")) for word in words) or (
        experiment is not None and "policy=tiny" not in words
    )
    words = [word for word in words if not word.startswith("policy.model=")]
    if experiment and "datamodule=alfworld_generated" not in words:
        words = [*words, "datamodule=alfworld_generated"]
    if "ckpt_path=last" in words and not any(word.startswith("iterations=") for word in words):
        more = 61 if "experiment=quickstart" in words else 2  # than commands before it have played
        words = [*words, f"iterations={more}"]
    checks = "stage=check" in words
    shown = [*([] if checks else SMALL), *([model, "policy.dtype=float32"] if hub else [])]
    return [words[0], *shown, *words[1:]]  # what a page types holds


@pytest.mark.soak
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_command_of_a_how_to_does_not_run(page: Path, desk: Path) -> None:
    played, wrong = 0, []
    for words in {tuple(words): list(words) for words in commands(page)}.values():
        known = {word for word in words if word in ELSEWHERE}
        bare = len(words) == 2 and words[1] in ("train.py", "eval.py")  # a word in a sentence
        if known or words[0] in FOREIGN or bare:
            continue
        try:
            play(desk, words)
            played += 1
        except (AssertionError, subprocess.TimeoutExpired) as error:
            wrong.append(str(error))
    assert not wrong, "\n\n".join(wrong)
    print(f"{page.name}: {played} commands were played")
