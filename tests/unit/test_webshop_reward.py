import random
from dataclasses import replace

import pytest

from aem_lightning.envs.webshop.goals import (
    NO_CAP,
    Goal,
    draw_cap,
    goal_order,
    human_goals,
    split_ranges,
    synthetic_goals,
)
from aem_lightning.envs.webshop.products import Product, indexed_text, read_price, read_product
from aem_lightning.envs.webshop.reward import (
    judge,
    matched_options,
    normal_colour,
    token_set_ratio,
    type_factor,
)

TENT = Product(
    asin="B000000001",
    title="Corana Quick Dry Tent",
    description="It keeps you Warm.",
    bullets=["Easy Clean", "two doors"],
    query="tent",
    category="outdoor",
    product_category="Sports › Camping › Tents",
    price=30.0,
    price_tag="$30.0",
    options={"color": ["navy", "red"], "size": ["small", "large"]},
    attributes=["quick dry", "water proof"],
    nouns=["corana", "tent"],
)


def changed(**fields):
    return replace(TENT, **fields)


def goal(attributes=("quick dry",), options=("navy",), cap=40.0):
    return Goal(0, "", list(attributes), options, cap)


@pytest.mark.parametrize(
    ("bought", "chosen", "wanted", "reward"),
    [
        ({}, {"color": "navy"}, goal(), 1.0),
        ({}, {"color": "red"}, goal(), 2 / 3),
        ({}, {}, goal(), 2 / 3),
        ({"price": 40.5}, {"color": "navy"}, goal(), 2 / 3),
        ({"price": 40.0}, {"color": "navy"}, goal(), 1.0),
        ({"attributes": ["soft"], "title": "Tent"}, {"color": "navy"}, goal(), 2 / 3),
        ({}, {}, goal(options=()), 1.0),
        # by the words of title, bullets and description
        ({"attributes": []}, {}, goal(["quick dry", "easy clean", "warm"], ()), 1.0),
        ({}, {"color": "navy"}, goal(options={"color": "navy", "size": "large"}), 3 / 4),
        (
            {},
            {"color": "navy", "size": "large"},
            goal(options={"color": "navy", "size": "large"}),
            1,
        ),
    ],
)
def test_a_purchase_is_worth_its_share_of_what_was_wanted(bought, chosen, wanted, reward):
    assert judge(changed(**bought), chosen, wanted, TENT).reward == pytest.approx(reward, abs=0)


@pytest.mark.parametrize(
    ("bought", "factor"),
    [
        ({}, 1.0),
        ({"query": "lamp", "product_category": "Sports › Camping › Lamps"}, 1.0),
        ({"query": "lamp", "product_category": "x"}, 1.0),  # half of the nouns
        ({"nouns": ["lamp"]}, 0.0),  # the same query does not help
        ({"nouns": []}, 0.0),
    ],
)
def test_the_kind_of_product_scales_the_reward(bought, factor):
    assert type_factor(changed(**bought), TENT) == factor


def test_few_common_nouns_count_less_the_fewer_they_are():
    other = {"query": "lamp", "product_category": "x"}
    many = [f"n{i}" for i in range(10)]
    fifth, twelfth = changed(nouns=many[:5]), changed(nouns=[*many, "x", "y"])
    assert type_factor(changed(nouns=["n0"], **other), fifth) == 0.5
    assert type_factor(changed(nouns=["n0"], **other), twelfth) == 0.1
    assert type_factor(changed(nouns=["n0"]), twelfth) == 0.1
    assert type_factor(changed(**other), changed(nouns=[])) == 0.5


def test_nouns_that_a_title_repeats_count_against_it():
    assert type_factor(
        changed(nouns=["tent"], query="x", product_category="x"),
        changed(nouns=["tent", "tent", "tent", "tent", "tent"]),
    ) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("chosen", "wanted", "count"),
    [
        (["dark navy"], ["navy"], 0),  # "dark" is found first
        (["navy stripe"], ["navy"], 1),
        (["x-large"], ["large"], 1),
        (["a", "navy"], ["navy", "navy"], 2),
        (["navy"], [("color", "navy")], 1),
        (["blueberry"], [("flavor", "blueberry")], 0),  # upstream's quirk: chosen is "blue"
        (["blueberry"], ["blueberry"], 1),
    ],
)
def test_options_match_as_upstream_has_it(chosen, wanted, count):
    assert matched_options(chosen, wanted) == count


def test_a_colour_is_the_first_of_the_list_that_a_value_contains():
    assert normal_colour("red and black") == "black"
    assert normal_colour("tailored") == "red"
    assert normal_colour("12 ounce") == "12 ounce"
    assert normal_colour(("color", "dark red")) == ("color", "dark red")


def test_the_ratio_drops_latin_letters_and_no_others():
    assert token_set_ratio("café", "caf") == 100
    assert token_set_ratio("毛", "毛") == 100
    assert token_set_ratio("é", "é") == 0
    assert token_set_ratio("quick, DRY", "dry quick") == 100


@pytest.mark.parametrize(
    ("pricing", "price", "tag"),
    [
        (None, 100.0, "$100.0"),
        ("", 100.0, "$100.0"),
        ("see page", 100.0, "$100.0"),
        ("$12.99", 12.99, "$12.99"),
        ("$1,299.00", 1299.0, "$1299.0"),
        ("$7", 7.0, "$7.0"),
    ],
)
def test_prices_are_read_as_upstream_reads_them(pricing, price, tag):
    assert read_price(pricing, "key") == (price, tag)


def test_a_price_within_a_range_is_drawn_once():
    price, tag = read_price("$8.50$24.00", "key")
    assert tag == "$8.5 to $24.0"
    assert 8.5 <= price <= 24.0
    assert read_price("$8.50$24.00", "key") == (price, tag)
    assert read_price("$8.50$24.00", "other")[0] != price


def test_rows_become_products_as_upstream_has_it():
    row = {
        "asin": "B1",
        "name": "Lamp",
        "full_description": None,
        "small_description": "one",
        "pricing": "$3.00",
        "query": " Desk LAMPS ",
        "category": "garden",
        "product_category": "a › b",
        "customization_options": {
            "Color": [{"value": " Red/Blue "}, {"value": "Green"}],
            "Style": None,
        },
    }
    product = read_product(row, None, ["lamp"], 0)
    assert product.options == {"color": ["red | blue", "green"]}
    assert (product.query, product.bullets, product.attributes) == (
        "desk lamps",
        ["one"],
        ["DUMMY_ATTR"],
    )
    assert indexed_text(product) == "lamp  one color: red | blue, green"


def test_the_cap_is_the_larger_of_two_of_the_next_four_tens():
    caps = {draw_cap(25.0, str(key))[0] for key in range(200)}
    assert caps == {40.0, 50.0, 60.0}
    assert draw_cap(20.0, "k")[0] > 30.0
    assert draw_cap(25.0, "k") == draw_cap(25.0, "k")
    assert draw_cap(979.0, "k") == (990.0, ", and price lower than 990.00 dollars")
    assert draw_cap(985.0, "k") == (NO_CAP, "")


def test_human_goals_are_sentences_and_those_without_attributes_go():
    rows = [
        {
            "instruction": "buy it.",
            "instruction_attributes": ["soft"],
            "instruction_options": ["a"],
        },
        {"instruction": "x", "instruction_attributes": [], "instruction_options": []},
    ]
    (made,) = human_goals(5, changed(price=995.0), rows, 0)
    assert made == Goal(5, "buy it", ["soft"], ["a"], NO_CAP)


def test_synthetic_goals_are_every_combination_of_values():
    row = {"instruction": "Find me a tent", "instruction_attributes": ["soft"]}
    made = list(synthetic_goals(5, changed(price=995.0), row, 0))
    assert [g.options for g in made] == [
        {"color": color, "size": size} for color in ("navy", "red") for size in ("small", "large")
    ]
    assert made[0].instruction == "Find me a tent with color: navy, and size: small"
    assert not list(synthetic_goals(5, TENT, {"instruction": None}, 0))
    (plain,) = synthetic_goals(5, changed(options={}, price=995.0), row, 0)
    assert plain.instruction == "Find me a tent"


def test_goals_are_shuffled_as_upstream_shuffles_them():
    goals = [f"goal {i}" for i in range(2000)]
    order = goal_order(2000)
    random.Random(233).shuffle(goals)
    assert [f"goal {i}" for i in order] == goals


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        (
            "original",
            {"test": range(500), "dev": range(500, 1500), "train": range(1500, 6910)},
        ),
        ("verl_agent", {"val": range(500), "train": range(500, 6910)}),
        ({"a": [0, 10], "train": [10, None]}, {"a": range(10), "train": range(10, 6910)}),
    ],
)
def test_splits_are_slices_of_the_order_that_share_nothing(splits, expected):
    ranges = split_ranges(splits, 6910)
    assert ranges == expected
    numbers = [number for part in ranges.values() for number in part]
    assert len(numbers) == len(set(numbers)) == 6910


@pytest.mark.parametrize(
    ("splits", "count", "message"),
    [
        ("mine", 9, "allowed: original, verl_agent"),
        ({"test": [0, 11], "train": [10, None]}, 50, "test and train share goals"),
        ("original", 1500, "leaves train empty"),
    ],
)
def test_splits_that_make_no_sense_are_refused(splits, count, message):
    with pytest.raises(ValueError, match=message):
        split_ranges(splits, count)
