"""What every test gets: few threads, no hub, and a check that it leaves nothing behind."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

# Set before any test imports transformers or tokenizers: both read them once, at import.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import psutil
import pytest
import torch

# Models of the tests are so small that a second thread only makes them wait for each other.
torch.set_num_threads(1)

# What libraries set for the whole process, and take no variable back.
LIBRARY_VARIABLES = frozenset(
    {
        "ALFWORLD_DATA",  # alfworld.info, at import
        "PL_GLOBAL_SEED",  # lightning.seed_everything
        "PL_SEED_WORKERS",  # lightning.seed_everything
        "PYTEST_CURRENT_TEST",  # pytest, at each phase of a test
        "TORCH_CPP_LOG_LEVEL",  # a typed profile=true, for the torch that is imported next
        "TORCHINDUCTOR_CACHE_DIR",  # torch's compiler, at import: a dispatch mode imports it
    }
)
# A worker that was told to stop may still be on its way out.
EXIT_SECONDS = 5.0


# Modules that a package of the extra `adapters` is imported in.
collect_ignore = [] if find_spec("verifiers") else ["unit/vf_words.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; this machine has none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in LIBRARY_VARIABLES}


def child_processes() -> set[psutil.Process]:
    """Children that run, without the resource tracker, which serves the whole session."""
    running = set()
    for process in psutil.Process().children():
        try:
            tracker = any("resource_tracker" in word for word in process.cmdline())
            if not tracker and process.status() != psutil.STATUS_ZOMBIE:
                running.add(process)
        except psutil.NoSuchProcess:
            continue
    return running


def restore(before: dict[str, str]) -> list[str]:
    """Put the environment back as it was; the names that had been touched."""
    after = environment()
    touched = sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
    for name in touched:
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]
    return touched


def stop(processes: set[psutil.Process]) -> list[str]:
    """Kill what does not end by itself; the command lines of those that had to be killed."""
    _, alive = psutil.wait_procs(processes, timeout=EXIT_SECONDS)
    commands = []
    for process in alive:
        try:
            commands.append(" ".join(process.cmdline())[:200])
            process.kill()
        except psutil.NoSuchProcess:
            continue
    return commands


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    """Fail a test that leaks an environment variable or a child process, and mend both.

    pytest sets up fixtures of a wider scope first, so those may hold processes and variables.
    """
    variables, processes = environment(), child_processes()
    yield
    touched = restore(variables)
    killed = stop(child_processes() - processes)
    problems = []
    if touched:
        problems.append(f"environment variables touched: {', '.join(touched)}; use monkeypatch")
    if killed:
        problems.append(f"child processes left: {'; '.join(killed)}; close what started them")
    if problems:
        pytest.fail("This test left something behind. " + ". ".join(problems), pytrace=False)


@pytest.fixture
def command(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """``command("train.py", *overrides)``: how that command line ends."""
    from commands import run_script

    return partial(run_script, capfd=capfd, monkeypatch=monkeypatch)


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model, warm-started on the toy environment: it wins a third of its episodes."""
    import runs

    return runs.warm_started_model(tmp_path_factory.mktemp("toy_model"))


@pytest.fixture(scope="module")
def import_benchmark() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of ``benchmarks/`` as its scripts import each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        yield importlib.import_module


@pytest.fixture(scope="session")
def alfworld_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few generated games, in the layout of the official ones."""
    from aem_lightning.envs.alfworld import generate_games

    root = tmp_path_factory.mktemp("alfworld")
    sizes = {"train": 6, "valid_seen": 3, "valid_unseen": 3}
    generate_games(root, sizes=sizes, difficulty="easy", seed=0, task_types=None, workers=1)
    return root


@pytest.fixture(scope="session")
def webshop_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small generated shop, in the official files' layout."""
    from aem_lightning.envs.webshop import GeneratedCatalogue, generate_catalogue

    root = tmp_path_factory.mktemp("webshop")
    generate_catalogue(root, GeneratedCatalogue(products=24))
    return root


@pytest.fixture(scope="session")
def swe_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four embedded instances: two to train on, one of each evaluation split."""
    from aem_lightning.envs.swe.generate import generate_instances
    from aem_lightning.envs.swe.sandbox import LocalSandbox

    root = tmp_path_factory.mktemp("swe") / "embedded"
    generate_instances(root, count=4, sandbox=LocalSandbox(allow_unsafe=True))
    return root
