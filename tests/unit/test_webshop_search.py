import json
from pathlib import Path

import numpy as np
import pytest

from aem_lightning.envs.webshop.analyzer import Analyzer
from aem_lightning.envs.webshop.index import LENGTHS, Chunk, Index, invert, length_code, merge
from aem_lightning.envs.webshop.porter import stem

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
