"""What mkdocs asks for at each build: the reference pages, made of `__all__` and of configs.

``mkdocs.yml`` names this file; ``make docs`` builds.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
PACKAGE = ROOT / "src" / "aem_lightning"
ROOMS = ("functional", "algorithms", "envs", "datamodules", "rollout", "callbacks")
OPTION = re.compile(
    r"^(?P<indent> *)(?P<key>[\w.]+):(?: +(?P<value>[^#].*?))?(?: +# (?P<says>.*))?$"
)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    pages = {"options": options_page(), **{room: room_page(room) for room in ROOMS}}
    for name, text in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links that leave ``docs`` lead to the repository."""
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")

    def outside(found: re.Match[str]) -> str:
        place = posixpath.normpath(posixpath.join(folder, found[1]))
        return found[0] if place.startswith("docs/") else f"]({config.repo_url}/blob/main/{place})"

    return re.sub(r"\]\((\.\./[^)#\s]+)\)", outside, markdown)


def room_page(room: str) -> str:
    """The public names of a room of the package, each with its docstring."""
    tree = ast.parse((PACKAGE / room / "__init__.py").read_text("utf-8"))
    homes: dict[str, str] = {}
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            homes |= {alias.name: node.module for alias in node.names}
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
    parts = [f"::: {homes[name]}.{name}\n" for name in names]
    head = [f"# aem_lightning.{room}\n", f"{ast.get_docstring(tree)}\n"]
    return "\n".join([*head, *parts])


def options_page() -> str:
    """Every YAML file of ``configs``: what it is, then a row for each key."""
    head = (
        "# Options\n\nMade from the files in `configs` and their comments. On the command line "
        "`python train.py --help` shows those of a run, and `--cfg job` what it is composed of."
    )
    parts = [head]
    entries = [CONFIGS / name for name in ("train.yaml", "eval.yaml")]
    groups = sorted(path for path in CONFIGS.iterdir() if path.is_dir())
    for group in groups:
        entries += sorted(group.glob("*.yaml"))
    seen = CONFIGS
    for path in entries:
        if path.parent != seen:
            seen = path.parent
            parts.append(f"## {seen.name}=")
        level = "##" if path.parent == CONFIGS else "###"
        name = path.stem if path.parent == CONFIGS else f"{path.parent.name}={path.stem}"
        parts.append(f"{level} {name}\n\n{file_part(path.read_text('utf-8'))}")
    return "\n\n".join(parts) + "\n"


def file_part(text: str) -> str:
    """The words over a file's keys, and the table of the keys."""
    says: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            says.append(line.removeprefix("#").strip())
    rows = [f"| `{key}` | {code(value)} | {cell(told)} |" for key, value, told in options(text)]
    table = "\n".join(["| key | default | |", "|---|---|---|", *rows]) if rows else ""
    return "\n\n".join(filter(None, [markdown_safe(" ".join(says)), table]))


def options(text: str) -> Iterator[tuple[str, str, str]]:
    """Dotted key, value and comment of every line of a file that has a key, its defaults aside."""
    stack: list[tuple[int, str]] = []
    for line in text.splitlines():
        found = OPTION.match(line)
        if found is None:
            continue
        indent = len(found["indent"])
        while stack and stack[-1][0] >= indent:
            stack.pop()
        stack.append((indent, found["key"]))
        key = ".".join(name for _, name in stack)
        value = found["value"] or ""
        if (value and value != "|-") or found["says"]:
            yield key, value, found["says"] or ""


def code(value: str) -> str:
    """A value for a table's cell."""
    return f"`{value}`".replace("|", "\\|") if value else ""


def cell(text: Any) -> str:
    """A comment for a table's cell."""
    return markdown_safe(str(text)).replace("|", "\\|")


def markdown_safe(text: str) -> str:
    """A comment's text: angle brackets are no tags."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else p.replace("<", "&lt;") for p in parts)
