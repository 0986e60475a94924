"""What README and pages tell a reader: commands that the project takes, places that are there."""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from packages import EXAMPLES, installed
from runs import CONFIGS, ROOT

from aem_lightning.analysis.__main__ import ANALYSES
from aem_lightning.envs import check_env
from aem_lightning.gpu_check.__main__ import OPTIONS
from aem_lightning.runner.command import Command
from aem_lightning.runner.early import check_evaluation, check_training
from aem_lightning.runner.played import as_training, contradiction, plays_model
from aem_lightning.types import TROUBLESHOOTING

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
TARGETS = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = set(PROJECT["optional-dependencies"])
# Other people's programs.
OTHERS = {
    *("alfworld-download", "apt", "cd", "export", "git", "hf", "pip", "pre-commit", "source"),
    *("spacy", "swebench", "tensorboard", "vllm"),
}
# What the tests' environment lacks a package for.
ELSEWHERE = {"hparams_search=quickstart_optuna", ".[sweep]"}
SCRIPTS = PROJECT.get("scripts", {})
LAUNCHERS = {"torchrun", "srun", "sbatch"}
OURS = ("python ", "make ", "torchrun ", "srun ", "sbatch ", "pip install")


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command: of bash blocks, and of code in a sentence that begins as one."""
    text = re.sub(r"\\\n", " ", page.read_text("utf-8"))
    lines = [
        line
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
    ]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    codes = (" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose))
    lines += [code for code in codes if code.startswith(OURS)]
    for line in lines:
        words = shlex.split(re.sub(r"<[^<>]*>", "somewhere", line), comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            command = [word for word in words[:end] if "..." not in word]
            words = words[end + 1 :]
            while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
                command = command[1:]
            if command and not ELSEWHERE & set(command):
                yield command


def without_files(check: Callable[[Any], object]) -> Callable[[Any], None]:
    """``check``, on a machine that has every checkpoint, model and data set."""

    def checked(cfg: Any) -> None:
        with contextlib.suppress(FileNotFoundError):
            check(cfg)

    return checked


def answer(script: str, words: list[str]) -> None:
    """Ask the project's own command, as far as it answers before anything is made."""
    name, check = "train", check_training
    if script == "eval":
        assert not contradiction(words)
        name, check = "eval", check_evaluation
        if plays_model(words):
            name, words = "train", as_training(words)
    elif script == "analysis":
        analysis = ANALYSES[words[0]]
        name, check = f"analysis/{analysis.config or words[0]}", analysis.check
        words = [re.sub(r"^\+*experiment=", "+typed_experiment=", word) for word in words[1:]]
    try:
        Command(CONFIGS, name, script, "", without_files(check)).answer(words)
    finally:
        GlobalHydra.instance().clear()


@functools.cache
def take(words: tuple[str, ...]) -> None:
    """Raise where the project does not take a command."""
    first, *rest = words
    if first in LAUNCHERS:
        place = next(i for i, word in enumerate(words) if word.endswith(("train.py", "slurm.sh")))
        assert (ROOT / words[place]).is_file()
        given = [word for word in words[place + 1 :] if not word.startswith("trainer.num_nodes=")]
        servers = ["engine=vllm", "engine.urls=[http://a:8000]"] if first == "sbatch" else []
        answer("train", [*given, *servers])  # as the launcher or the script starts it
    elif first == "make":
        wanted = {word for word in rest if re.fullmatch(r"[a-z-]+", word)}
        assert wanted <= TARGETS, f"no target {wanted - TARGETS}"
    elif first in SCRIPTS:
        module_takes(SCRIPTS[first].partition(":")[0].removesuffix(".__main__"), rest)
    elif first == "pip":
        named = re.findall(r"\.\[([a-z,-]+)\]", " ".join(rest))
        assert {extra for group in named for extra in group.split(",")} <= EXTRAS
        assert all((ROOT / word).is_dir() for word in rest if word.startswith("examples/"))
    elif first == "python" and rest[0] in ("train.py", "eval.py"):
        answer(rest[0].removesuffix(".py"), rest[1:])
    elif first == "python" and rest[0] == "-m":
        module_takes(rest[1], rest[2:])
    elif first == "python":
        places = (ROOT, ROOT / "benchmarks")
        assert any((place / rest[0]).is_file() for place in places), f"no file {rest[0]}"
    else:
        assert Path(first).name in OTHERS, f"{first}: neither ours nor known"


def main_of(module: str) -> bool:
    """Whether ``python -m module`` is a package's own command."""
    return (ROOT / "src" / module.replace(".", "/") / "__main__.py").is_file()


def module_takes(module: str, words: list[str]) -> None:
    if module == "aem_lightning.analysis":
        answer("analysis", words)
    elif module == "aem_lightning.gpu_check":
        assert {word.partition("=")[0] for word in words} <= OPTIONS.keys()
    elif module.startswith("aem_lightning.") and main_of(module):
        importlib.import_module(f"{module}.__main__").parser().parse_args(words)
    else:
        there = [place / module.replace(".", "/") for place in (ROOT / "src", ROOT / "tests")]
        ours = any(place.with_suffix(".py").is_file() or place.is_dir() for place in there)
        assert ours or module.partition(".")[0] in OTHERS, f"no module {module}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_command_of_a_page_is_refused(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("ALFWORLD_DATA", "WEBSHOP_DATA", "AEM_LIGHTNING_ROOT"):
        monkeypatch.delenv(variable, raising=False)
    wrong = []
    with contextlib.ExitStack() as stack:
        for example in EXAMPLES.glob("*/pyproject.toml"):
            stack.enter_context(installed(example.parent.name, tmp_path / example.parent.name))
        for words in {tuple(words): None for words in commands(page)}:
            try:
                take(words)
            except SystemExit as end:
                wrong.append(f"{shlex.join(words)}\n    {end.code}")
            except (AssertionError, KeyError, StopIteration) as error:
                wrong.append(f"{shlex.join(words)}\n    {error!r}")
    assert not wrong, "\n".join(wrong)


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub and the site make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def anchors(page: Path) -> set[str]:
    prose = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    return {slug(title) for title in re.findall(r"^#+ (.*)$", prose, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_leads_nowhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        place = page.parent / path if path else page
        assert place.exists() or "reference/" in path, target
        assert not anchor or place.suffix != ".md" or anchor in anchors(place), target


def test_an_error_refers_to_a_symptom_that_has_no_heading() -> None:
    named = set()
    for path in (ROOT / "src").rglob("*.py"):
        named |= set(re.findall(r"\{TROUBLESHOOTING\}#([\w-]+)", path.read_text("utf-8")))
    assert len(named) >= 7
    assert named <= anchors(ROOT / TROUBLESHOOTING)


SAVED = re.compile(r"^```python\n(.*?)^```.*?Saved as `(\w+)\.py`", re.DOTALL | re.MULTILINE)
PARTS = [(page, *found) for page in PAGES for found in SAVED.findall(page.read_text("utf-8"))]


@pytest.mark.parametrize(("page", "source", "name"), PARTS, ids=[part[2] for part in PARTS])
def test_an_environment_of_a_page_breaks_its_contract(
    page: Path, source: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{name}.py").write_text(source, "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    (typed,) = set(re.findall(rf"_target_={name}\.(\w+)", page.read_text("utf-8")))
    try:
        check_env(getattr(importlib.import_module(name), typed)(), resets=5, tasks_per_split=2)
    finally:
        sys.modules.pop(name, None)
