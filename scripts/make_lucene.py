"""Makes tests/vectors/lucene.json: what Lucene itself ranks for some documents and queries.

The jar comes with the search library that upstream's shop uses:

    pip download --no-deps pyserini==0.17.0
    unzip -j pyserini-0.17.0-py3-none-any.whl '*anserini*fatjar.jar'
    python scripts/make_lucene.py anserini-0.14.3-fatjar.jar

Needs a JDK (11 or newer). Anserini 0.14.3 has Lucene 8.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

RANK = """
import io.anserini.search.SimpleSearcher;
import java.nio.file.*;
import java.util.*;
public class Rank {
  public static void main(String[] a) throws Exception {
    SimpleSearcher searcher = new SimpleSearcher(a[0]);
    StringBuilder out = new StringBuilder();
    for (String query : Files.readAllLines(Paths.get(a[1]))) {
      List<String> row = new ArrayList<>();
      for (SimpleSearcher.Result hit : searcher.search(query, 50))
        row.add(hit.docid + ":" + hit.score);
      out.append(String.join(" ", row)).append("\\n");
    }
    Files.writeString(Paths.get(a[2]), out.toString());
    searcher.close();
  }
}
"""
ROOTS = (
    "relate operate hope adjust nation value digit conform vile analog decide predict feudal "
    "hop fizz fall tap sit plaster happy sky cry agree feed bleed motor sing size trouble able "
    "replace defend irritate allow adopt triplicate form formal electric good sensible radical "
    "homologous communism activate angular effective probate rate cease control roll machine "
    "wash dry skin care shine bottle portable wire connect protect comfort breath fashion style "
    "rely carry study apply easy heavy quick strong stretch cushion polish gloss natural organ "
    "vegan gluten sugar butter berry spice roast grill bake freeze heat cool warm soft firm"
).split()
ENDINGS = (
    "s es ed ing er ers ly ness ment ments ation ations ational izer ization ful fulness able "
    "ible ibility ability ous ousness ive iveness al ally ality ance ence ant ent ion ions ism "
    "ate iti ically bli logi eed ies y".split()
)
ODD = (
    "7.5 1,000 1080p 4k u.s.a 3.5mm 100x45x45cm 52\" x 63\" (pack of 2) men's women\u2019s kids' "
    "t-shirt wi-fi usb-c a/c 5'4\" rock'n'roll o'neill can't \u00e9clair na\u00efve \u00bd \u00b2 "
    "\u6bdb\u5dfe \u30bf\u30aa\u30eb x_y _ __init__ 50% #1 & @home c++ foo:bar 12:30 a.b.c 1.2.3 "
    "\u00b5m e.g. the of with for not THE X-Large 3X-Large ph.d 9-12 2019/20 don\u2019t \u00fcber"
).split(" ")


def collection(rng: random.Random) -> list[dict[str, str]]:
    """Documents that differ in length by two orders of magnitude, some of them twins."""
    words = ROOTS + [root + rng.choice(ENDINGS) for root in ROOTS for _ in range(4)]
    texts = []
    for _ in range(260):
        size = int(2 ** rng.uniform(1, 7.5))
        common = rng.choices(words, weights=[1 / (i + 1) for i in range(len(words))], k=size)
        texts.append(" ".join([*common, *rng.choices(ODD, k=1 + size // 6)]).lower())
    texts += rng.sample(texts, 40)
    ids = rng.sample([f"{i:04X}" for i in range(5000)], len(texts))
    return [{"id": i, "contents": text} for i, text in zip(ids, texts, strict=True)]


def questions(rng: random.Random, documents: list[dict[str, str]]) -> list[str]:
    """Words of documents, in any case, some twice; words of their own; and nothing at all."""
    asked = []
    for _ in range(110):
        pool = rng.choice(documents)["contents"].split() + rng.choice(documents)["contents"].split()
        words = rng.choices(pool + ROOTS[:20], k=rng.randint(1, 12))
        asked.append(rng.choice([str.lower, str.title, str.upper])(" ".join(words)))
    return [*asked, "the of", "zzz", "hope hope hope hop", "men's", "usb-c 7.5", "\u6bdb"]


def main(jar: str) -> None:
    """Index the documents with Anserini, ask the questions, and write down what it says."""
    rng = random.Random(8)
    documents = collection(rng)
    queries = questions(rng, documents)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").mkdir()
        lines = "\n".join(json.dumps(document) for document in documents)
        (folder / "in" / "documents.jsonl").write_text(lines, encoding="utf-8")
        (folder / "queries").write_text("\n".join(queries), encoding="utf-8")
        (folder / "Rank.java").write_text(RANK, encoding="utf-8")
        index = ["-collection", "JsonCollection", "-input", f"{folder}/in", "-threads", "1"]
        index += ["-index", f"{folder}/index", "-generator", "DefaultLuceneDocumentGenerator"]
        java = ["java", "-Dfile.encoding=UTF-8", "-cp", jar]
        subprocess.run([*java, "io.anserini.index.IndexCollection", *index], check=True)
        arguments = [f"{folder}/index", f"{folder}/queries", f"{folder}/ranked"]
        subprocess.run([*java, f"{folder}/Rank.java", *arguments], check=True)
        ranked = (folder / "ranked").read_text(encoding="utf-8").splitlines()
    result = {
        "source": "anserini-0.14.3-fatjar.jar of pyserini==0.17.0 (Lucene 8), by make_lucene.py",
        "documents": {document["id"]: document["contents"] for document in documents},
        "ranked": [
            {
                "query": query,
                "hits": [[i, float(s)] for i, s in (h.split(":") for h in row.split())],
            }
            for query, row in zip(queries, ranked, strict=True)
        ],
    }
    target = Path(__file__).parents[1] / "tests" / "vectors" / "lucene.json"
    text = json.dumps(result, ensure_ascii=False, separators=(",", ":"))
    target.write_text(text.replace('},{"query"', '},\n{"query"') + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
