"""The rooms of the package and the arrows between them: who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "aem_lightning"

# room: the rooms that it may import, itself always included
ARROWS = {
    "types": set(),
    "beats": set(),
    "files": set(),
    "card": set(),
    "lazy": set(),
    "new": {"runner"},
    "collectives": set(),
    "functional": {"types"},
    "envs": {"types"},
    "rollout": {"types", "beats", "collectives", "functional"},
    "algorithms": {"types", "collectives", "functional"},
    "modules": {
        "types",
        "beats",
        "files",
        "lazy",
        "collectives",
        "functional",
        "rollout",
        "algorithms",
        "metrics",
    },
    "datamodules": {"types", "lazy", "envs"},
    "callbacks": {"types", "beats", "files", "card", "collectives"},
    "metrics": {"types"},
    "runner": {
        "types",
        "files",
        "card",
        "lazy",
        "collectives",
        "functional",
        "envs",
        "rollout",
        "algorithms",
        "modules",
        "datamodules",
        "callbacks",
        "metrics",
    },
    "viewer": {"card"},
    "export": {"files", "rollout", "viewer", "analysis"},
    "hub": {"card", "files", "runner"},
    "gpu_check": {"types", "files", "modules", "rollout", "runner"},
    "analysis": {
        "types",
        "functional",
        "rollout",
        "algorithms",
        "modules",
        "datamodules",
        "callbacks",
        "runner",
    },
}
OPTIONAL = {
    "alfworld",
    "bitsandbytes",
    "datasets",
    "gymnasium",
    "ijson",
    "matplotlib",
    "mlflow",
    "openai",
    "openenv",
    "rapidfuzz",
    "reasoning_gym",
    "spacy",
    "swebench",
    "textarena",
    "textworld",
    "verifiers",
    "wandb",
}
HYDRA = {"hydra", "omegaconf"}
HEAVY = {"lightning", "peft", "pytorch_lightning", "torch", "torchmetrics", "transformers"}


@dataclass(frozen=True)
class Import:
    """One import statement: what is imported, where, and when it runs."""

    module: str
    place: str
    at_import: bool
    typing_only: bool

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]

    @property
    def room(self) -> str | None:
        package, _, rest = self.module.partition(".")
        return rest.partition(".")[0] if package == "aem_lightning" and rest else None


def targets(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Full names that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert not node.level, "imports name the whole path"
    if node.module == "aem_lightning":  # from aem_lightning import functional: the name is the room
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return [node.module or ""]


def imports_of(path: Path) -> Iterator[Import]:
    def walk(node: ast.AST, at_import: bool, typing_only: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for module in targets(node):
                place = f"{path.relative_to(ROOT)}:{node.lineno}"
                yield Import(module, place, at_import, typing_only)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for child in node.body:
                yield from walk(child, at_import, True)
            for child in node.orelse:
                yield from walk(child, at_import, typing_only)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from walk(child, at_import and not inside, typing_only)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), True, False)


def rooms() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        found.setdefault(room, []).append(path)
    found.pop("__init__", None)
    return found


ROOMS = rooms()


def imports_in(room: str) -> list[Import]:
    return [found for path in ROOMS[room] for found in imports_of(path)]


def places(found: list[Import]) -> list[str]:
    return [f"{entry.place} imports {entry.module}" for entry in found]


def test_every_room_has_arrows():
    assert ROOMS
    assert set(ROOMS) <= set(ARROWS), "a new room needs its arrows in ARROWS"


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_imports_only_along_its_arrows(room):
    allowed = ARROWS[room] | {room}
    against = [i for i in imports_in(room) if i.room is not None and i.room not in allowed]
    assert not places(against)


@pytest.mark.parametrize("room", ["envs", "types"])
def test_a_light_room_runs_without_the_heavy_packages(room):
    assert not places([i for i in imports_in(room) if i.top in HEAVY and not i.typing_only])


def test_functional_imports_torch_alone():
    allowed = sys.stdlib_module_names | {"aem_lightning", "torch"}
    assert not places([i for i in imports_in("functional") if i.top not in allowed])


def test_hydra_stays_at_the_edge():
    edge = ("analysis", "gpu_check", "runner")
    inner = [i for room in ROOMS if room not in edge for i in imports_in(room)]
    assert not places([i for i in inner if i.top in HYDRA])


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_optional_packages_are_imported_where_they_are_used(room):
    early = [i for i in imports_in(room) if i.at_import and not i.typing_only]
    assert not places([i for i in early if i.top in OPTIONAL])


@pytest.mark.parametrize("module", ["envs", "types"])
def test_a_worker_starts_without_torch(module):
    script = (
        f"import sys, aem_lightning.{module}\n"
        f"print(*sorted({HEAVY | OPTIONAL | HYDRA!r} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT / "src",  # -c puts the working directory first on the path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
