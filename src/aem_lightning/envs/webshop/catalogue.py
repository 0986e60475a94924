"""A prepared catalogue: products, goals and search, memory-mapped and shared by all sessions."""

from __future__ import annotations

import json
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from aem_lightning.envs.webshop.goals import Goal
from aem_lightning.envs.webshop.index import Index
from aem_lightning.envs.webshop.products import Product
from aem_lightning.envs.webshop.records import Records

MANIFEST = "manifest.json"
FOUND = 50  # products that a search finds at most


class Catalogue:
    """What every session of the shop reads, in a folder that `prepare_catalogue` made.

    Nothing in it changes. Products and searches that were used lately are kept as objects; all else
    stays on disk, in pages that processes share.

    Attributes:
        manifest: How it was made: parameters, digest, counts.

    Raises:
        FileNotFoundError: There is no finished catalogue.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"No prepared catalogue: {path} is missing. WebShopDataModule.prepare_data() makes "
                "it; python train.py does so by itself"
            )
        self.manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        self._products = products = Records(folder / "products")
        self._goals = Records(folder / "goals")
        self._order = np.load(folder / "goal_order.npy", mmap_mode="r")
        self._categories = np.load(folder / "goal_categories.npy", mmap_mode="r")
        index = Index(folder / "index")
        # Product ``number`` in the order of the data, and the best ones for ``query``, best first.
        self.product = lru_cache(maxsize=4096)(lambda number: Product(**products[number]))
        self.search = lru_cache(maxsize=1024)(
            lambda query: tuple(number for number, _ in index.search(query, FOUND))
        )

    @property
    def num_products(self) -> int:
        return len(self._products)

    @property
    def num_goals(self) -> int:
        return len(self._goals)

    @property
    def tagger(self) -> str:
        """What found the nouns: a spaCy model, ``given`` or ``fallback``."""
        return str(self.manifest["parameters"]["nouns"])

    def goal(self, number: int) -> Goal:
        """Goal ``number`` of the shuffled goals."""
        return Goal(**self._goals[int(self._order[number])])

    def category(self, number: int) -> str:
        """The category of the product of goal ``number``."""
        return str(self.manifest["categories"][int(self._categories[int(self._order[number])])])


@cache
def open_catalogue(folder: str) -> Catalogue:
    """The catalogue in ``folder``, which all sessions of this process share."""
    return Catalogue(Path(folder))
