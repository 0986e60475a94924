import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from aem_lightning.envs.webshop.analyzer import Analyzer
from aem_lightning.envs.webshop.index import LENGTHS, Chunk, Index, invert, length_code, merge
from aem_lightning.envs.webshop.porter import stem
from aem_lightning.envs.webshop.products import indexed_text, read_product
from aem_lightning.envs.webshop.word_breaks import words

LUCENE = Path(__file__).parents[1] / "vectors" / "lucene.json"


def index_of(folder, ids, texts, chunk_size=70):
    chunks = []
    for number, start in enumerate(range(0, len(texts), chunk_size)):
        path = folder / f"{number}.npz"
        invert(texts[start : start + chunk_size], Analyzer()).save(path)
        chunks.append(lambda path=path: Chunk.load(path))
    merge(chunks, ids, folder / "index")
    return Index(folder / "index")


@pytest.fixture(scope="module")
def lucene():
    return json.loads(LUCENE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def index(lucene, tmp_path_factory):
    documents = lucene["documents"]
    return index_of(tmp_path_factory.mktemp("index"), list(documents), list(documents.values()))


def test_every_query_ranks_its_hits_as_lucene_does(lucene, index):
    ids = list(lucene["documents"])
    assert len(lucene["ranked"]) == 116
    assert sum(len(case["hits"]) for case in lucene["ranked"]) == 5451
    for case in lucene["ranked"]:
        found = index.search(case["query"])
        assert [ids[number] for number, _ in found] == [hit for hit, _ in case["hits"]]
        # Anserini rounds to four decimals and sets equal scores apart by a millionth each.
        scores = [score for _, score in found]
        np.testing.assert_allclose(scores, [score for _, score in case["hits"]], atol=1e-4)


def test_equal_scores_are_ranked_by_id_and_cut_at_k(tmp_path):
    ids = [f"{(7 * i) % 100:03d}" for i in range(100)]
    index = index_of(tmp_path, ids, ["same words"] * 100)
    assert [ids[n] for n, _ in index.search("words", 7)] == sorted(ids)[:7]
    assert len(index.search("words")) == 50


def test_chunks_of_any_size_make_the_same_index(lucene, index, tmp_path):
    documents = lucene["documents"]
    whole = index_of(tmp_path, list(documents), list(documents.values()), chunk_size=1000)
    for case in lucene["ranked"][:40]:
        assert whole.search(case["query"]) == index.search(case["query"])


@pytest.mark.parametrize("texts", [[], ["", "the of"]])
def test_an_index_without_words_finds_nothing(texts, tmp_path):
    index = index_of(tmp_path, [str(i) for i in range(len(texts))], texts)
    assert index.search("lamp") == []


def test_a_query_without_words_finds_nothing(index):
    for query in ("", "the of", "?!", "zzzzz"):
        assert index.search(query) == []


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("7.5 inch, U.S.A. 100x45x45cm", ["7.5", "inch", "u.s.a", "100x45x45cm"]),
        ("men's wi-fi a/c", ["men", "wi", "fi", "c"]),
        ("毛巾 towel²", ["毛", "巾", "towel"]),
        ("1,000 o'neill rock'n'roll", ["1,000", "o'neil", "rock'n'rol"]),
        (
            "size\uff1alarge 1\u20442 \u00ae\u2605\u2714 \u2776\uff9f",
            ["size\uff1alarg", "1\u20442", "\u00ae", "\u2605", "\u2714"],
        ),
    ],
)
def test_text_is_split_as_lucene_splits_it(text, terms):
    assert Analyzer()(text) == terms


# Porter's own examples, and the two rules that were changed later.
STEMS = (
    "caresses:caress ponies:poni feed:feed agreed:agre plastered:plaster "
    "conflated:conflat hopping:hop falling:fall filing:file happy:happi relational:relat "
    "conformabli:conform analogi:analog hopefulness:hope electriciti:electr adoption:adopt "
    "controll:control is:is"
)


@pytest.mark.parametrize(("word", "expected"), [pair.split(":") for pair in STEMS.split()])
def test_words_are_stemmed_as_porter_does(word, expected):
    assert stem(word) == expected


def test_lengths_are_kept_exactly_up_to_forty_and_then_in_eighths():
    assert [LENGTHS[length_code(n)] for n in range(41)] == list(range(41))
    assert LENGTHS[length_code(1000)] == 984
    codes = [length_code(n) for n in range(5000)]
    assert codes == sorted(codes)


def test_words_of_every_class_are_those_of_lucene():
    vectors = Path(__file__).parents[1] / "vectors" / "lucene_words.json"
    for text, found in json.loads(vectors.read_text(encoding="utf-8")).items():
        assert words(text) == found, ascii(text)


def test_a_long_word_is_cut_where_lucene_cuts_it():
    assert [len(word) for word in words(f"{'a' * 300} b")] == [255, 45, 1]
    assert words("_" * 300 + "a") == ["_" * 254 + "a"]
    assert [len(word) for word in words("\U00010400" * 200)] == [127, 73]  # two units each


GENUINE = Path(__file__).parents[3] / "shared" / "real" / "webshop"


@pytest.mark.skipif(not GENUINE.is_dir(), reason="the official products are not at hand")
def test_genuine_products_are_ranked_as_lucene_ranks_them(tmp_path):
    rows = json.loads(gzip.decompress((GENUINE / "items_shuffle_1000.json.gz").read_bytes()))
    texts = {row["asin"]: indexed_text(read_product(row, None, [], 0)) for row in rows}
    ids = list(texts)
    index = index_of(tmp_path, ids, list(texts.values()))
    for line in (GENUINE / "lucene_top50.tsv").read_text(encoding="utf-8").splitlines():
        query, hits = line.split("\t")
        expected = [(asin, float(score)) for asin, score in (h.split(":") for h in hits.split())]
        found = index.search(query, 50)
        np.testing.assert_allclose([s for _, s in found], [s for _, s in expected], atol=1e-4)
        ours, theirs = {}, {}  # products of one score have no order
        for (number, score), (asin, _) in zip(found, expected, strict=True):
            ours.setdefault(round(score, 3), set()).add(ids[number])
            theirs.setdefault(round(score, 3), set()).add(asin)
        last = round(found[-1][1], 3)  # which of those with the last score are shown is chance
        assert {k: v for k, v in ours.items() if k != last} == {
            k: v for k, v in theirs.items() if k != last
        }
