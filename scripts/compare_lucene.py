"""Hold WebShop's search against Lucene itself, and say where they differ; nothing may.

Words of random texts and of every character, terms of the same texts, and the order of the first 50
products for random queries. Lucene comes in the jar of pyserini, and runs in this process:

    pip install JPype1 && pip download --no-deps -d data/lucene pyserini==0.22.1
    python scripts/compare_lucene.py data/lucene/pyserini-0.22.1-py3-none-any.whl

Needs Java 17. ``--products FILE`` reads an official ``items_shuffle*.json`` in place of a generated
catalogue; ``--vectors FILE`` keeps a few texts with Lucene's words, for the tests.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from aem_lightning.envs.webshop import GeneratedCatalogue, generate_catalogue
from aem_lightning.envs.webshop.analyzer import Analyzer
from aem_lightning.envs.webshop.index import Index, invert, merge
from aem_lightning.envs.webshop.products import indexed_text, is_kept, read_product
from aem_lightning.envs.webshop.word_breaks import TABLE, words

ASSIGNED = [*range(1, 0xD800), *range(0xE000, 0x32000), *range(0xE0000, 0xE0200)]
COMMON = "ab1 2.,;:'\"_-/#*S s\u2019\u00ae\u2605"
DEEP = 2000  # of Lucene's hits that are looked at for the products of one score


class Lucene:
    """The jar's tokenizer, analyzer and search."""

    def __init__(self, jar: Path) -> None:
        import jpype

        jpype.startJVM("-Xmx1g", "-XX:+UseSerialGC", classpath=[str(jar)])
        self._java = jpype.JClass
        self._attribute = self._java("org.apache.lucene.analysis.tokenattributes.CharTermAttribute")
        self._tokenizer = self._java("org.apache.lucene.analysis.standard.StandardTokenizer")()
        self._analyzer = self._java(
            "io.anserini.analysis.DefaultEnglishAnalyzer"
        ).newDefaultInstance()

    def words(self, text: str) -> list[str]:
        """What StandardTokenizer finds."""
        self._tokenizer.setReader(self._java("java.io.StringReader")(text))
        return self._read(self._tokenizer)

    def terms(self, text: str) -> list[str]:
        """What Anserini's English analyzer makes of a text."""
        return self._read(self._analyzer.tokenStream("contents", text))

    def _read(self, stream: Any) -> list[str]:
        found, term = [], stream.addAttribute(self._attribute.class_)
        stream.reset()
        while stream.incrementToken():
            found.append(str(term.toString()))
        stream.end()
        stream.close()
        return found

    def searcher(
        self, texts: dict[str, str], folder: Path
    ) -> Callable[[str], list[tuple[str, float]]]:
        """Index ``texts`` by id; a function from a query to ids and scores, best first."""
        java, lucene = self._java, "org.apache.lucene"
        field = java(f"{lucene}.document.TextField")
        stored = java(f"{lucene}.document.StringField")
        kept, dropped = (getattr(java(f"{lucene}.document.Field$Store"), x) for x in ("YES", "NO"))
        store = java(f"{lucene}.store.FSDirectory").open(
            java("java.nio.file.Paths").get(str(folder))
        )
        bm25 = java(f"{lucene}.search.similarities.BM25Similarity")(0.9, 0.4)
        config = java(f"{lucene}.index.IndexWriterConfig")(self._analyzer)
        config.setSimilarity(bm25)
        writer = java(f"{lucene}.index.IndexWriter")(store, config)
        for number, text in texts.items():
            document = java(f"{lucene}.document.Document")()
            document.add(stored("id", number, kept))
            document.add(field("contents", text, dropped))
            writer.addDocument(document)
        writer.close()
        searcher = java(f"{lucene}.search.IndexSearcher")(
            java(f"{lucene}.index.DirectoryReader").open(store)
        )
        searcher.setSimilarity(bm25)
        bag = java("io.anserini.search.query.BagOfWordsQueryGenerator")()

        def search(query: str) -> list[tuple[str, float]]:
            hits = searcher.search(
                bag.buildQuery("contents", self._analyzer, query), DEEP
            ).scoreDocs
            return [(str(searcher.doc(hit.doc).get("id")), float(hit.score)) for hit in hits]

        return search


def random_texts(count: int, seed: int) -> Iterable[str]:
    """Short texts of characters of every class, of every script, and of those that shops write."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    spans = [[span.split("-") for span in kind.split()] for kind in table.values()]
    rng = random.Random(seed)
    for number in range(count):
        letters = []
        for _ in range(rng.randint(1, 14)):
            if number % 3 == 2 or (number % 3 == 1 and rng.random() < 0.5):
                letters.append(chr(rng.choice(ASSIGNED)) if number % 3 == 2 else rng.choice(COMMON))
            else:
                span = rng.choice(rng.choice(spans))
                letters.append(chr(rng.randint(int(span[0], 16), int(span[-1], 16))))
        yield "".join(letters)


def products(path: Path | None) -> dict[str, str]:
    """Texts that the shop indexes, by asin."""
    with tempfile.TemporaryDirectory() as folder:
        if path is None:
            generate_catalogue(Path(folder), GeneratedCatalogue(products=1000, difficulty="hard"))
            path = Path(folder, "items_shuffle.json")
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            rows = json.load(file)
    found: dict[str, str] = {}
    for row in rows:
        if is_kept(asin := str(row["asin"])) and asin not in found:
            found[asin] = indexed_text(read_product(row, None, [], 0))
    return found


def queries(texts: dict[str, str], count: int, seed: int) -> Iterable[str]:
    """Words that stand beside each other in products, and words of several."""
    rng, listed = random.Random(seed), list(texts.values())
    for _ in range(count):
        first, second = (rng.choice(listed).split() for _ in range(2))
        at = rng.randrange(len(first))
        picked = first[at : at + rng.randint(1, 8)] + rng.sample(
            second, min(len(second), rng.randint(0, 3))
        )
        yield " ".join(picked)


def other_rankings(lucene: Lucene, texts: dict[str, str], asked: Iterable[str]) -> list[str]:
    """The queries whose first 50 differ by more than the order of products of one score."""
    with tempfile.TemporaryDirectory() as name:
        folder, ids = Path(name), list(texts)
        chunk = invert(texts.values(), Analyzer())
        merge([lambda: chunk], ids, folder / "ours")
        ours = Index(folder / "ours")
        theirs = lucene.searcher(texts, folder / "theirs")
        wrong = []
        for query in asked:
            scores = dict(theirs(query))
            found = [(ids[number], score) for number, score in ours.search(query, 50)]
            best = sorted(scores.values(), reverse=True)[:50]
            if [scores.get(asin) for asin, _ in found] != best:
                wrong.append(query)
        return wrong


def main() -> int:
    """Compare, print what differs, and end with status 1 where something does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path, help="pyserini's wheel, or the jar in it")
    parser.add_argument("--products", type=Path)
    parser.add_argument("--texts", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vectors", type=Path)
    given = parser.parse_args()
    jar = given.wheel
    if jar.suffix == ".whl":
        with zipfile.ZipFile(given.wheel) as wheel:
            (name,) = (n for n in wheel.namelist() if n.endswith("fatjar.jar"))
            jar = given.wheel.with_name(Path(name).name)
            if not jar.exists():
                jar.write_bytes(wheel.read(name))
    lucene, analyze = Lucene(jar), Analyzer()
    alone = [f"a {chr(point)} b" for point in ASSIGNED]
    long = [
        "a" * 300,
        "x." * 200,
        "1," * 200,
        "\U00010400" * 200,
        "a" + "\u0301" * 400,
        "_" * 300 + "a",
    ]
    texts = [*long, *random_texts(given.texts, given.seed)]
    for name, ours, theirs in (("words", words, lucene.words), ("terms", analyze, lucene.terms)):
        wrong = [text for text in texts if ours(text) != theirs(text)]
        joined = [" \n".join(alone[i : i + 500]) for i in range(0, len(alone), 500)]
        wrong += [text for text in joined if ours(text) != theirs(text)]
        print(f"{name}: {len(wrong)} of {len(texts)} texts differ, every character among others")
        for text in wrong[:5]:
            print(f"  {text[:80]!r}: {ours(text)[:20]}, Lucene: {theirs(text)[:20]}")
        status = bool(wrong)
    shop = products(given.products)
    asked = list(queries(shop, given.queries, given.seed))
    wrong = other_rankings(lucene, shop, asked)
    print(f"ranking: {len(wrong)} of {len(asked)} queries over {len(shop)} products differ")
    for query in wrong[:5]:
        print(f"  {query!r}")
    if given.vectors:
        kept = {text: lucene.words(text) for text in random_texts(600, given.seed + 1)}
        lines = ",\n".join(
            f"{json.dumps(text)}: {json.dumps(found)}" for text, found in kept.items()
        )
        given.vectors.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    return int(status or bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
