"""Shoppers that upstream's site recorded, shopping again here.

Few of the products that they saw are at hand, so a shop is made of what a recording tells of them.
What is checked: the pages that follow each other, the products of each page of results, the options
of the purchase, and the reward with its parts.
"""

import json
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest

from aem_lightning.envs.webshop import CatalogueFiles, WebShopEnv, goals, prepare_catalogue, task_id
from aem_lightning.envs.webshop.reward import judge

RECORDED = Path(__file__).parents[3] / "shared" / "real" / "webshop" / "trajectories"
PAGES = {"index": "WebShop", "search_results": "Page ", "item_page": "Rating: N.A."}


def shop_of(goal, visits, folder):
    """The shop of a recording: every product that it names, as far as the recording knows it."""
    bought, parts = visits[-1]["content"], visits[-1]["reward_info"]
    share = Fraction(parts["title_score"]).limit_denominator(60)
    nouns = [f"noun{i}" for i in range(share.numerator)]
    has = round(parts["r_att"] * len(goal["attributes"]))
    found = [asin for visit in visits for asin in visit["content"].get("search_result_asins", ())]
    rows = {asin: row(asin) for asin in (*found, goal["asin"])}
    rows[goal["asin"]] |= {name: goal[name] for name in ("query", "category", "product_category")}
    # Upstream divides by the length of a list that may hold a noun twice.
    rows[goal["asin"]]["title_nouns"] = nouns + nouns[:1] * (share.denominator - share.numerator)
    rows[bought["asin"]] |= {
        "pricing": f"${bought['price']}",
        "query": goal["query"] if parts["query_match"] else "another",
        "product_category": goal["product_category"] if parts["category_match"] else "another",
        "customization_options": {k: [{"value": v}] for k, v in bought["options"].items()},
    }
    rows[bought["asin"]].setdefault("title_nouns", nouns)
    human = {
        "instruction": goal["instruction_text"].rpartition(goals.CAP_WORDS)[0],
        "instruction_attributes": goal["attributes"],
        "instruction_options": goal["goal_options"],
    }
    contents = {
        "items_shuffle": [{"title_nouns": ["other"], **fields} for fields in rows.values()],
        "items_ins_v2": {bought["asin"]: {"attributes": goal["attributes"][:has] or ["none"]}},
        "items_human_ins": {goal["asin"]: [human]},
    }
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return prepare_catalogue(CatalogueFiles(folder, nouns="given"), progress=False)


def row(asin):
    fields = ("full_description", "query", "category", "product_category")
    fields = {name: "" for name in fields} | {"small_description": [], "pricing": "$1.00"}
    return {"asin": asin, "name": f"Product {asin}", "customization_options": {}, **fields}


def clicks(visits):
    """What leads from each recorded page to the next; nothing where it was loaded again."""
    for before, visit in pairwise(visits):
        content, was = visit["content"], before["content"]
        match before["page"], visit["page"]:
            case "index", "search_results":
                action = f"search[{' '.join(content['keywords'])}]"
            case "search_results", "search_results":
                action = "click[next >]"
            case "search_results", "item_page":
                action = f"click[{content['asin'].lower()}]"
            case "item_page", "item_page":
                (value,) = dict(content["options"].items() - was["options"].items()).values()
                action = f"click[{value}]"
            case "item_page", "item_sub_page":
                names = ("Description", "Features", "Reviews")
                (name,) = (name for name in names if f"/{name}/" in visit["url"])
                action = f"click[{name.lower()}]"
            case "item_sub_page" | "item_page", "search_results" | "item_page":
                action = "click[< prev]"
            case "index", "index":
                action = None
            case _, "index":
                action = "click[back to search]"
            case "item_page", "done":
                action = "click[buy now]"
        yield action, visit


@pytest.mark.skipif(not RECORDED.is_dir(), reason="the recorded shoppers are not at hand")
def test_nine_recorded_shoppers_end_here_as_they_did_upstream(tmp_path, monkeypatch):
    recordings = sorted(RECORDED.glob("*.jsonl"))
    assert len(recordings) == 9
    for path in recordings:
        visits = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        visits = [{**visit, "content": visit.get("content") or {}} for visit in visits]
        replay(visits, tmp_path / path.stem, monkeypatch)


def replay(visits, folder, monkeypatch):
    goal, last = visits[0]["goal"], visits[-1]
    cap = goal["price_upper"]
    with monkeypatch.context() as patch:  # the cap that upstream drew
        text = f"{goals.CAP_WORDS} {cap:.2f} dollars"
        patch.setattr(goals, "draw_cap", lambda price, key: (cap, text))
        folder.mkdir()
        env = WebShopEnv(shop_of(goal, visits, folder))
    numbers = {env._product(n).asin: n for n in range(env._catalogue.num_products)}
    found = {}
    for visit in visits:
        if visit["page"] == "search_results":
            hits = found.setdefault(" ".join(visit["content"]["keywords"]), {})
            hits[visit["content"]["page"]] = visit["content"]["search_result_asins"]
    ranked = {
        query: tuple(numbers[asin] for page in sorted(hits) for asin in hits[page])
        for query, hits in found.items()
    }
    monkeypatch.setattr(env._catalogue, "search", ranked.__getitem__)
    text, info = env.reset(options={"task_id": task_id(0)})
    assert info["goal"] == goal["instruction_text"]
    for action, visit in clicks(visits):
        reward, over = 0.0, False
        if action is not None:
            text, reward, over, _, info = env.step(action)
            assert info["is_action_valid"], action
        content, shown = visit["content"], text.split(" [SEP] ")
        assert over == (visit["page"] == "done")
        assert any(part.startswith(PAGES.get(visit["page"], "")) for part in shown)
        if visit["page"] == "search_results":
            assert f"Page {content['page']} (Total results: {len(env._session.found)})" in shown
            assert [part for part in shown if part in numbers] == content["search_result_asins"]
        elif visit["page"] == "item_page":
            assert f"Product {content['asin']}" in shown
    assert reward == last["reward"]
    place = shown.index("asin")
    assert shown[place : place + 3] == ["asin", last["content"]["asin"], "options"]
    assert json.loads(shown[place + 3]) == last["content"]["options"]
    bought, parts = env._product(numbers[last["content"]["asin"]]), last["reward_info"]
    target = env._product(env._session.goal.product)
    verdict = judge(bought, last["content"]["options"], env._session.goal, target)
    assert (verdict.type, verdict.attributes, verdict.price) == (
        *(parts["r_type"], parts["r_att"], parts["r_price"]),
    )
    assert verdict.options == parts.get("r_option", 1.0)  # where none is wanted there is no entry
    if bought.asin == goal["asin"]:  # the larger of two of the next four tens
        assert goal["price_upper"] in [ten for ten in goals.CAPS if ten > bought.price][1:4]
