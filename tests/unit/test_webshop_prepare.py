import json
import subprocess
import sys
from functools import partial

import pytest

from aem_lightning.envs import MissingExtraError
from aem_lightning.envs.webshop import (
    Catalogue,
    CatalogueFiles,
    GeneratedCatalogue,
    generate_catalogue,
    prepare_catalogue,
)
from aem_lightning.envs.webshop import prepare as prepare_module
from aem_lightning.envs.webshop.nouns import load_tagger
from aem_lightning.envs.webshop.records import Records, write_records

prepared = partial(prepare_catalogue, progress=False)


def row(asin, name="Lamp", **fields):
    return {
        "asin": asin,
        "name": name,
        "full_description": "",
        "small_description": [""],
        "pricing": "$5.00",
        "query": "lamp",
        "category": "garden",
        "product_category": "a",
        "customization_options": {},
        "title_nouns": ["lamp"],
        **fields,
    }


HUMAN = {
    "instruction": "buy a lamp",
    "instruction_attributes": ["lamp"],
    "instruction_options": [],
}


def files(root, rows, human=(), attributes=(), **settings):
    contents = {"items_shuffle": rows, "items_ins_v2": dict(attributes)}
    contents["items_human_ins"] = dict(human)
    for name, content in contents.items():
        (root / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return CatalogueFiles(root, **{"nouns": "given", **settings})


def asins(folder):
    return [record["asin"] for record in Records(folder / "products")]


def contents(folder):
    """Every file of a catalogue but the manifest, which knows when its sources were changed."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


def test_products_are_kept_as_upstream_keeps_them(tmp_path):
    rows = [row("nan"), row("B1", "one"), row("B1", "two"), row("B" * 11), row("B2"), row("B3")]
    folder = prepared(files(tmp_path, rows))
    assert asins(folder) == ["B1", "B2", "B3"]
    assert Catalogue(folder).product(0).title == "one"


def test_the_first_rows_alone_are_taken_where_that_is_asked_for(tmp_path):
    rows = [row("nan"), *(row(f"B{i}") for i in range(9))]
    assert asins(prepared(files(tmp_path, rows, num_products=4))) == ["B0", "B1", "B2"]


def test_attributes_and_goals_find_their_products(tmp_path):
    made = files(
        tmp_path,
        [row("B1"), row("B2", category="beauty"), row("B3")],
        human={"B2": [HUMAN, HUMAN | {"instruction_attributes": []}], "B9": [HUMAN]},
        attributes={"B2": {"attributes": ["soft"]}},
    )
    catalogue = Catalogue(prepared(made))
    assert [list(catalogue.product(n).attributes) for n in range(3)] == [
        ["DUMMY_ATTR"],
        ["soft"],
        ["DUMMY_ATTR"],
    ]
    assert catalogue.num_goals == 1
    assert catalogue.goal(0).product == 1
    assert catalogue.category(0) == "beauty"


def test_a_synthetic_catalogue_needs_no_human_file(tmp_path):
    instruction = {"attributes": ["x"], "instruction": "Find", "instruction_attributes": ["x"]}
    made = files(tmp_path, [row("B1")], attributes={"B1": instruction}, goals="synthetic")
    (tmp_path / "items_human_ins.json").unlink()
    assert Catalogue(prepared(made)).goal(0).instruction.startswith("Find, and price lower than")


def test_the_size_of_chunks_changes_nothing(tmp_path):
    generate_catalogue(tmp_path, GeneratedCatalogue(products=90, difficulty="medium"))
    made = CatalogueFiles(tmp_path, nouns="given")
    whole = contents(prepared(made))
    prepared(made).rename(tmp_path / "aside")
    assert contents(prepared(made, chunk_size=7)) == whole


@pytest.mark.parametrize("broken", ["invert", "merge", "write_records"])
def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path, monkeypatch, broken):
    generate_catalogue(tmp_path, GeneratedCatalogue(products=90, difficulty="medium"))
    made = CatalogueFiles(tmp_path, nouns="given")
    whole = contents(prepared(made, chunk_size=20))
    prepared(made).rename(tmp_path / "whole")
    real = getattr(prepare_module, broken)
    calls = []

    def stops(*arguments):
        calls.append(arguments)
        if len(calls) == (4 if broken != "merge" else 1):
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(prepare_module, broken, stops)
    with pytest.raises(KeyboardInterrupt):
        prepared(made, chunk_size=20)
    monkeypatch.undo()
    read = []
    real_products = prepare_module._Preparation._products
    monkeypatch.setattr(
        prepare_module._Preparation,
        "_products",
        lambda self, rows, *rest: read.append(len(rows)) or real_products(self, rows, *rest),
    )
    assert contents(prepared(made, chunk_size=20)) == whole
    assert read == ([] if broken == "merge" else [20, 10])


def test_a_finished_catalogue_is_taken_as_it_is(tmp_path, monkeypatch):
    made = files(tmp_path, [row("B1")])
    folder = prepared(made)
    monkeypatch.setattr(prepare_module, "invert", None)
    assert prepared(made) == folder


def test_changed_files_make_another_catalogue(tmp_path):
    folder = prepared(files(tmp_path, [row("B1")]))
    assert prepared(files(tmp_path, [row("B1"), row("B2")])) != folder


def test_processes_that_want_the_same_catalogue_get_one(tmp_path):
    generate_catalogue(tmp_path, GeneratedCatalogue(products=60))
    script = (
        "from pathlib import Path\n"
        "from aem_lightning.envs.webshop import CatalogueFiles, prepare_catalogue\n"
        f"files = CatalogueFiles(Path({str(tmp_path)!r}), nouns='given')\n"
        "print(prepare_catalogue(files, progress=False))"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    folders = {process.communicate(timeout=60)[0].strip() for process in running}
    assert len(folders) == 1
    assert Catalogue(tmp_path / folders.pop()).num_products == 60
    assert not list((tmp_path / "prepared").glob("*.partial"))


def test_a_file_that_was_cut_short_says_so(tmp_path):
    made = files(tmp_path, [row(f"B{i}") for i in range(50)])
    whole = (tmp_path / "items_shuffle.json").read_text()
    (tmp_path / "items_shuffle.json").write_text(whole[:-300])
    with pytest.raises(ValueError, match=r"items_shuffle\.json is no whole JSON.*fetch it again"):
        prepared(made)


def test_missing_files_are_named_with_what_to_do(tmp_path):
    made = files(tmp_path, [row("B1")])
    (tmp_path / "items_ins_v2.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"items_ins_v2\.json.*datamodule=webshop_generated"
    ):
        prepared(made)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"goals": "all"}, "human, synthetic"), ({"num_products": 0}, "at least 1")],
)
def test_settings_out_of_range_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        CatalogueFiles(tmp_path, **settings)


def test_a_shop_without_products_is_prepared_and_searched(tmp_path):
    catalogue = Catalogue(prepared(files(tmp_path, [])))
    assert (catalogue.num_products, catalogue.num_goals) == (0, 0)
    assert catalogue.search("lamp") == ()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A spaCy model with a few rules for tags, in place of the large English one."""
    spacy = pytest.importorskip("spacy")
    made = spacy.blank("en")
    rules = made.add_pipe("attribute_ruler")
    for word, tag in (("Lamp", "NOUN"), ("Corana", "PROPN"), ("bright", "ADJ"), ("shines", "VERB")):
        rules.add([[{"ORTH": word}]], {"POS": tag})
    folder = tmp_path_factory.mktemp("model")
    made.to_disk(folder)
    return str(folder)


def test_nouns_are_those_that_spacy_tags_as_nouns_and_names(tmp_path, model):
    rows = [row("B1", "Corana bright Lamp shines Lamp"), row("B2", "bright")]
    made = files(tmp_path, rows, nouns=model)
    catalogue = Catalogue(prepared(made))
    assert catalogue.product(0).nouns == ["corana", "lamp", "lamp"]
    assert catalogue.product(1).nouns == []
    assert catalogue.tagger == model


def test_the_fallback_takes_every_word_but_stop_words(tmp_path):
    made = files(tmp_path, [row("B1", "The Lamp for 2 bright rooms")], nouns="fallback")
    catalogue = Catalogue(prepared(made))
    assert catalogue.product(0).nouns == ["lamp", "bright", "rooms"]
    assert catalogue.tagger == "fallback"


def test_a_missing_model_says_how_to_fetch_it_and_how_to_do_without():
    pytest.importorskip("spacy")
    with pytest.raises(FileNotFoundError, match=r"spacy download no_model.*nouns=fallback"):
        load_tagger("no_model")


@pytest.mark.parametrize(("package", "extra"), [("spacy", "webshop-nouns"), ("ijson", "webshop")])
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    made = files(tmp_path, [row("B1")], nouns="en_core_web_lg" if package == "spacy" else "given")
    with pytest.raises(MissingExtraError, match=rf"{package} is not installed.*\[{extra}\]"):
        prepared(made)


def test_records_are_read_back_one_by_one(tmp_path):
    given = [{"a": 1}, "ü › 毛", [], None]
    assert write_records(tmp_path / "x", given) == 4
    records = Records(tmp_path / "x")
    assert list(records) == given
    for number in (-1, 4):
        with pytest.raises(IndexError, match="there are 4"):
            records[number]
