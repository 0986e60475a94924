"""The embedded libraries: small packages with tests, whose sources lie beside this module as texts.

They are data: nothing here imports them.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from textwrap import dedent

from aem_lightning.envs.swe.mutations import functions

TEST_FILE = "tests/test_core.py"


@dataclass(frozen=True)
class Library:
    """A package of one module: its name, and the source of the module and of its tests."""

    name: str
    core: str
    tests: str

    @property
    def core_file(self) -> str:
        """The module's path in the repository."""
        return f"{self.name}/core.py"

    def tree(self, core: str, tests: str) -> dict[str, str]:
        """Every file of the repository, with another module and other tests."""
        names = [node.name for node in _definitions(core)]
        exported = "\n".join(f'    "{name}",' for name in names)
        imported = "\n".join(f"    {name}," for name in names)
        init = f"from {self.name}.core import (\n{imported}\n)\n\n__all__ = [\n{exported}\n]\n"
        return {
            f"{self.name}/__init__.py": init,
            self.core_file: core,
            TEST_FILE: tests,
            "README.md": f"# {self.name}\n\n{ast.get_docstring(ast.parse(core))}\n",
            ".gitignore": "__pycache__/\n.pytest_cache/\n",
        }

    def docstring(self, symbol: str) -> str:
        """What the documentation of a function says; "" where there is none."""
        found = dict(functions(ast.parse(self.core))).get(symbol)
        return (ast.get_docstring(found) if found else None) or ""

    def test_body(self, name: str) -> str:
        """What a test does, without its name."""
        lines = self.tests.splitlines()
        for node in _definitions(self.tests):
            if node.name == name:
                return dedent("\n".join(lines[node.body[0].lineno - 1 : node.end_lineno]))
        raise KeyError(name)

    def tests_without(self, names: set[str]) -> str:
        """The tests, some left out."""
        lines = self.tests.splitlines(keepends=True)
        kept = []
        end = 0
        for node in _definitions(self.tests):
            if node.name not in names:
                kept.append("".join(lines[end : node.end_lineno]))
            elif end == 0:  # what stands above the first test stays
                kept.append("".join(lines[: node.lineno - 1]).rstrip("\n") + "\n")
            end = node.end_lineno or end
        return "".join(kept)


@cache
def load_libraries() -> tuple[Library, ...]:
    """Every embedded library, sorted by name."""
    root = files("aem_lightning.envs.swe").joinpath("libraries")
    return tuple(
        Library(
            folder.name,
            folder.joinpath("core.txt").read_text(encoding="utf-8"),
            folder.joinpath("tests.txt").read_text(encoding="utf-8"),
        )
        for folder in sorted(root.iterdir(), key=lambda place: place.name)
        if folder.is_dir()
    )


def _definitions(source: str) -> list[ast.FunctionDef | ast.ClassDef]:
    return [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
