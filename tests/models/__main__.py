"""``make models``: what was measured of models, section by section, as docs/models.md."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import transformers

TARGET = Path(__file__).parents[2] / "docs" / "models.md"
SECTIONS = ("families", "templates", "smollm2", "servers")
HEAD = f"""# Models

Written by `make models`, with transformers {transformers.__version__}.

A policy is a causal LM of transformers with LoRA adapters. Its logits come from the model's own
head, whatever that does to them, and its windows from the model's own rules. No list of families is
trusted: at the start of every run, a few real tokens are scored in every way that the run will
score them, and compared with the model itself (`modules/self_check.py`). A gap over 0.001 nats (in
half precision, over 0.1 in the mean) ends the run and says what to type."""


def main() -> None:
    """Write the page."""
    transformers.logging.set_verbosity_error()
    found = [name for name in SECTIONS if importlib.util.find_spec(f"models.{name}")]
    pages = [importlib.import_module(f"models.{name}").page() for name in found]
    TARGET.write_text("\n\n".join([HEAD, *pages]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
