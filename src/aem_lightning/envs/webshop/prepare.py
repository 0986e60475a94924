"""From the official files to a catalogue: streamed, resumable, as large as they come.

The files are read piece by piece and never held as a whole. What is done lies beside the target in
a folder of its own, chunk by chunk, so that a run that was stopped goes on where it was. The
catalogue appears all at once. Processes that want the same one wait for the first of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import shutil
import sqlite3
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from rich.progress import Progress

from aem_lightning.envs.base import import_extra
from aem_lightning.envs.data import check_webshop_files, webshop_paths
from aem_lightning.envs.webshop import goals
from aem_lightning.envs.webshop.analyzer import Analyzer
from aem_lightning.envs.webshop.catalogue import MANIFEST
from aem_lightning.envs.webshop.index import Chunk, invert, merge
from aem_lightning.envs.webshop.nouns import GIVEN, Tagger, load_tagger
from aem_lightning.envs.webshop.products import Product, indexed_text, is_kept, read_product
from aem_lightning.envs.webshop.records import DATA, Records, write_records

logger = logging.getLogger(__name__)

FORMAT = 2
STATE, SIDE = "state.json", "side.sqlite"


@dataclass(frozen=True)
class CatalogueFiles:
    """The official files, and how a catalogue is made of them.

    Attributes:
        root: The folder of the files.
        products: The products: a list of rows.
        attributes: Attributes and synthetic instructions: rows by asin.
        human: Human instructions: lists by asin; read for human goals alone.
        num_products: Take the first so many rows; None takes all.
        goals: ``human`` or ``synthetic``.
        nouns: What finds the nouns of titles: a spaCy model, ``fallback``, or ``given`` (rows have
            ``title_nouns``).
        seed: Key of the prices within ranges and of the price caps.
    """

    root: Path
    products: str = "items_shuffle.json"
    attributes: str = "items_ins_v2.json"
    human: str = "items_human_ins.json"
    num_products: int | None = None
    goals: goals.GoalKind = "human"
    nouns: str = "en_core_web_lg"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.goals not in goals.KINDS:
            raise ValueError(f"goals={self.goals!r}; allowed: {', '.join(goals.KINDS)}")
        if self.num_products is not None and self.num_products < 1:
            raise ValueError(f"num_products={self.num_products}; allowed: null, or at least 1")

    def paths(self) -> dict[str, Path]:
        """The files that are read."""
        return webshop_paths(
            self.root,
            goals=self.goals,
            products=self.products,
            attributes=self.attributes,
            human=self.human,
        )

    def parameters(self) -> dict[str, Any]:
        """Everything that the catalogue depends on; files by their name, size and time of change.

        Raises:
            FileNotFoundError: A file is missing.
        """
        check_webshop_files(self.paths().values())
        stats = {kind: path.stat() for kind, path in self.paths().items()}
        settings = {k: v for k, v in asdict(self).items() if k != "root"}
        files = {kind: [stat.st_size, stat.st_mtime_ns] for kind, stat in stats.items()}
        return {"format": FORMAT, **settings, "files": files}


def prepare_catalogue(
    files: CatalogueFiles, *, chunk_size: int = 20_000, progress: bool = True
) -> Path:
    """The folder of the catalogue made of ``files``, made where it is not there yet.

    Args:
        files: The official files.
        chunk_size: Products of one chunk, which a resumed run does not repeat.
        progress: Show a progress bar.

    Raises:
        FileNotFoundError: A file, or the model that finds nouns, is missing.
        ValueError: A file ends in the middle.
        MissingExtraError: ijson or spaCy is not installed.
    """
    parameters = files.parameters()
    key = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:12]
    folder = files.root / "prepared" / key
    if (folder / MANIFEST).is_file():
        return folder
    tagger = None if files.nouns == GIVEN else load_tagger(files.nouns)
    folder.parent.mkdir(exist_ok=True)
    with (folder.parent / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / MANIFEST).is_file():  # else another process was first
            partial_folder = folder.with_name(f"{key}.partial")
            partial_folder.mkdir(exist_ok=True)
            _Preparation(files, partial_folder, tagger, chunk_size, progress).run(parameters)
            partial_folder.rename(folder)
    return folder


class _Preparation:
    """The work in one partial folder; everything that it needs to go on lies there."""

    def __init__(
        self,
        files: CatalogueFiles,
        folder: Path,
        tagger: Tagger | None,
        chunk_size: int,
        progress: bool,
    ) -> None:
        self._files, self._folder, self._tagger = files, folder, tagger
        self._chunk_size = chunk_size
        self._bar = Progress(disable=not progress, transient=True)
        self._side = sqlite3.connect(folder / SIDE)
        self._categories: dict[str, int] = {}  # numbers by name
        self._categories_of_goals = array("i")

    def run(self, parameters: Mapping[str, Any]) -> None:
        with self._bar, contextlib.closing(self._side):
            self._read_side_files()
            state = self._read_products()
            self._merge(state["chunks"])
            products = Records(self._folder / "products")
            number = write_records(self._folder / "goals", self._goals(products))
        of_goals = np.array(self._categories_of_goals, dtype=np.int32)
        np.save(self._folder / "goal_order.npy", np.array(goals.goal_order(number), dtype=np.int64))
        np.save(self._folder / "goal_categories.npy", of_goals)
        known = hashlib.sha256(state["digest"].encode())  # of the products; the goals join them
        with (self._folder / f"goals{DATA}").open("rb") as file:
            digest = hashlib.file_digest(file, lambda: known).hexdigest()[:12]
        manifest = {
            "parameters": dict(parameters),
            "products": len(products),
            "goals": number,
            "categories": list(self._categories),
            "digest": digest,
        }
        for name in (STATE, SIDE):
            (self._folder / name).unlink()
        shutil.rmtree(self._folder / "chunks")
        (self._folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        logger.info(
            "%s: %d products, %d goals, nouns by %s, digest %s",
            self._folder.with_suffix(""),
            len(products),
            number,
            self._files.nouns,
            digest,
        )

    def _read_side_files(self) -> None:
        """What belongs to products by their asin, into a table that need not fit into memory."""
        side = self._side
        for kind, path in self._files.paths().items():
            if kind == "products":
                continue
            side.execute(f"CREATE TABLE IF NOT EXISTS {kind} (asin TEXT PRIMARY KEY, row TEXT)")
            if side.execute(f"SELECT 1 FROM {kind} WHERE asin = ''").fetchone():
                continue  # the mark of a whole table
            with self._bar.open(path, "rb", description=path.name) as file:
                rows = _parsed(path, "kvitems", file, "")
                texts = ((asin, json.dumps(row)) for asin, row in rows)
                side.executemany(f"INSERT OR REPLACE INTO {kind} VALUES (?, ?)", texts)
            side.execute(f"INSERT INTO {kind} VALUES ('', '')")
            side.commit()

    def _read_products(self) -> dict[str, Any]:
        """Products and their inverted texts, chunk by chunk; returns the state after the last."""
        chunks = self._folder / "chunks"
        chunks.mkdir(exist_ok=True)
        path = self._folder / STATE
        state: dict[str, Any] = {"read": 0, "chunks": 0, "digest": "", "is_whole": False}
        if path.exists():
            state = json.loads(path.read_text(encoding="utf-8"))
            logger.info("%s: %d rows are done, the rest follows", self._folder, state["read"])
        seen = {p["asin"] for i in range(state["chunks"]) for p in Records(chunks / f"{i}")}
        source = self._files.paths()["products"]
        with self._bar.open(source, "rb", description=source.name) as file:
            rows = islice(_parsed(source, "items", file, "item"), self._files.num_products)
            rows = islice(rows, state["read"], None)
            while not state["is_whole"]:
                taken = list(islice(rows, self._chunk_size))
                products = self._products(taken, seen)
                name = chunks / str(state["chunks"])
                write_records(name, map(asdict, products))
                invert(map(indexed_text, products), Analyzer()).save(name.with_suffix(".npz"))
                known = [state["digest"], *(json.dumps(asdict(product)) for product in products)]
                state = {
                    "read": state["read"] + len(taken),
                    "chunks": state["chunks"] + 1,
                    "digest": hashlib.sha256("".join(known).encode()).hexdigest()[:12],
                    "is_whole": len(taken) < self._chunk_size,
                }
                # Beside it first: a run that is stopped here leaves no part of a state.
                path.with_suffix(".new").write_text(json.dumps(state), encoding="utf-8")
                path.with_suffix(".new").replace(path)
        return state

    def _products(self, rows: list[dict[str, Any]], seen: set[str]) -> list[Product]:
        kept = []
        for row in rows:
            asin = str(row["asin"])
            if is_kept(asin) and asin not in seen:
                seen.add(asin)
                kept.append(row)
        titles = [str(row.get("name") or "") for row in kept]
        nouns = self._tagger(titles) if self._tagger else (row["title_nouns"] for row in kept)
        return [
            read_product(row, self._side_row(row["asin"]).get("attributes"), n, self._files.seed)
            for row, n in zip(kept, nouns, strict=True)
        ]

    def _side_row(self, asin: str, kind: str = "attributes") -> Any:
        found = self._side.execute(f"SELECT row FROM {kind} WHERE asin = ?", (asin,)).fetchone()
        return json.loads(found[0]) if found else {}

    def _merge(self, chunks: int) -> None:
        names = [self._folder / "chunks" / str(i) for i in range(chunks)]
        write_records(self._folder / "products", chain.from_iterable(map(Records, names)))
        shutil.rmtree(self._folder / "index", ignore_errors=True)
        loads = [partial(Chunk.load, name.with_suffix(".npz")) for name in names]
        ids = [product["asin"] for product in Records(self._folder / "products")]
        merge(loads, ids, self._folder / "index")

    def _goals(self, products: Records) -> Iterator[dict[str, Any]]:
        """The goals of every product, in upstream's order before the shuffle."""
        for number, record in enumerate(self._bar.track(products, description="goals")):
            product = Product(**record)
            if self._files.goals == "human":
                rows = self._side_row(product.asin, "human") or []
                made = goals.human_goals(number, product, rows, self._files.seed)
            else:
                row = self._side_row(product.asin)
                made = goals.synthetic_goals(number, product, row, self._files.seed)
            for goal in made:
                category = self._categories.setdefault(product.category, len(self._categories))
                self._categories_of_goals.append(category)
                yield asdict(goal)


def _parsed(path: Path, function: str, file: IO[bytes], prefix: str) -> Iterator[Any]:
    """What ijson's ``function`` finds in ``file``."""
    ijson = import_extra("ijson", "webshop")
    try:
        yield from getattr(ijson, function)(file, prefix, use_float=True)
    except ijson.JSONError as error:
        raise ValueError(
            f"{path} is no whole JSON file ({str(error).splitlines()[0]}); it may have been cut "
            "short: fetch it again"
        ) from error
