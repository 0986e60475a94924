"""Execute the notebooks from top to bottom and keep what they print and draw.

``python scripts/notebooks.py [name ...]``; ``make notebooks`` does it in the project's environment.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbclient
import nbformat

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks"


def execute(path: Path, timeout_s: int = 600) -> nbformat.NotebookNode:
    """The notebook at ``path`` with new outputs; a cell that raises ends it."""
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress"  # tqdm's: there are no widgets
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    where = {"metadata": {"path": str(FOLDER)}}
    client = nbclient.NotebookClient(
        notebook, timeout=timeout_s, resources=where, record_timing=False
    )
    return client.execute()


def main(names: list[str]) -> None:
    """Execute the named ones, or all."""
    for path in [FOLDER / f"{name}.ipynb" for name in names] or sorted(FOLDER.glob("*.ipynb")):
        notebook = execute(path)
        notebook.metadata.pop("language_info", None)
        nbformat.write(notebook, path)
        print(f"executed: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main(sys.argv[1:])
