import json
from functools import partial

import pytest
from webshop_players import shop_folder

from aem_lightning.envs import EnvPool, ResetRequest, check_env
from aem_lightning.envs.webshop import CatalogueFiles, WebShopEnv, prepare_catalogue, task_id
from aem_lightning.envs.webshop.env import SEARCH_HINT
from aem_lightning.envs.webshop.pages import Page, Part, done_page
from aem_lightning.types import Task

# A shop of a dozen, as the official files would describe it, with what is odd in them.
ROWS = [
    {
        "asin": f"B00000000{i:X}",
        "name": f"Lamp {i}",
        "full_description": "It shines." if i else "",
        "small_description": ["bright", "", "tall"] if i else [],
        "pricing": "$12.50$20.00" if i == 1 else "$12.50",
        "query": "lamp",
        "category": "garden",
        "product_category": "Home › Lamps",
        "customization_options": {
            "Color": [{"value": "red"}, {"value": "blue / 'green'"}],
            "Shade": [{"value": "red"}, {"value": "Features"}],
        },
        "title_nouns": ["lamp"],
    }
    for i in range(12)
]
HUMAN = {
    "B000000000": [
        {
            "instruction": "i need a bright lamp",
            "instruction_attributes": ["lamp"],
            "instruction_options": ["red"],
        }
    ]
}
INSTRUCTION = "i need a bright lamp, and price lower than"


@pytest.fixture(scope="module")
def odd_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("odd")
    contents = {"items_shuffle": ROWS, "items_ins_v2": {}, "items_human_ins": HUMAN}
    for name, content in contents.items():
        (root / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return prepare_catalogue(CatalogueFiles(root, nouns="given"), progress=False)


class Shopper:
    """An environment and what it showed last."""

    def __init__(self, folder, **arguments):
        self.env = WebShopEnv(folder, **arguments)
        self.text, self.info = self.env.reset(options={"task_id": task_id(0)})
        self.reward, self.over = 0.0, False

    def __call__(self, *actions):
        for action in actions:
            self.text, self.reward, self.over, _, self.info = self.env.step(action)
        return self

    @property
    def parts(self):
        """What is shown, with the price cap cut off."""
        shown = self.text.split(" [SEP] ")
        return [INSTRUCTION if part.startswith(INSTRUCTION) else part for part in shown]


@pytest.fixture
def shopper(odd_folder):
    return Shopper(odd_folder)


HEAD = ["Instruction:", INSTRUCTION, "Back to Search"]
ITEM = [
    *HEAD,
    *("< Prev", "color", "red", "blue  |  'green'", "shade", "red", "features"),
    *("Lamp 2", "Price: $12.5", "Rating: N.A.", "Description", "Features", "Reviews", "Buy Now"),
]


def test_the_first_page_has_the_instruction_and_search_alone(shopper):
    assert shopper.parts == ["WebShop", "Instruction:", INSTRUCTION, "Search"]
    assert shopper.info["admissible_actions"] == (SEARCH_HINT,)
    assert shopper.info["goal"] in shopper.text


def test_results_are_ten_a_page_and_next_is_there_past_the_end(shopper):
    shopper("search[Lamp]")
    assert shopper.parts[:5] == [*HEAD, "Page 1 (Total results: 12)", "Next >"]
    assert shopper.parts[5:8] == ["B000000000", "Lamp 0", "$12.5"]
    assert shopper.parts[8:11] == ["B000000001", "Lamp 1", "$12.5 to $20.0"]
    assert len(shopper.parts) == 5 + 30
    shopper("click[next >]")
    assert shopper.parts[3:6] == ["Page 2 (Total results: 12)", "< Prev", "Next >"]
    assert len(shopper.parts) == 6 + 6
    shopper("click[next >]")
    assert shopper.parts == [*HEAD, "Page 3 (Total results: 12)", "< Prev", "Next >"]
    assert shopper("click[< prev]", "click[< prev]").parts[3] == "Page 1 (Total results: 12)"
    assert "click[< prev]" not in shopper.info["admissible_actions"]


def test_a_products_page_shows_options_and_not_what_is_chosen(shopper):
    shopper("search[lamp 2]", "click[B000000002]")  # read in lower case
    assert shopper.parts == ITEM
    assert shopper("click[red]").parts == ITEM


def test_sub_pages_show_their_content_and_keep_the_options(odd_folder):
    shopper = Shopper(odd_folder, show_attributes=True)
    shopper("search[lamp]", "click[b000000002]", "click[blue  |  'green']")
    assert shopper("click[description]").parts == [*HEAD, "< Prev", "It shines."]
    # The button, not the option of that name.
    assert shopper("click[< prev]", "click[features]").parts == [*HEAD, "< Prev", "bright", "tall"]
    assert shopper("click[< prev]", "click[reviews]").parts == [*HEAD, "< Prev"]
    assert shopper("click[< prev]", "click[attributes]").parts[4:] == [
        *("DUMMY_ATTR", "garden", "lamp", "Home › Lamps"),
    ]
    shopper("click[< prev]", "click[buy now]")
    assert '{"color": "blue  |  \\u0027green\\u0027"}' in shopper.text


def test_a_product_without_features_or_description_has_empty_sub_pages(shopper):
    shopper("search[lamp]", "click[b000000000]")
    assert shopper("click[description]").parts == [*HEAD, "< Prev"]
    assert shopper("click[< prev]", "click[features]").parts == [*HEAD, "< Prev"]


def test_going_back_to_the_results_loses_the_options(shopper):
    shopper("search[lamp]", "click[next >]", "click[b00000000a]", "click[red]", "click[< prev]")
    assert shopper.parts[3] == "Page 2 (Total results: 12)"
    assert "options [SEP] {} [SEP]" in shopper("click[b00000000a]", "click[buy now]").text


def test_a_purchase_ends_the_episode_with_its_reward(shopper):
    shopper("search[lamp]", "click[b000000000]", "click[red]", "click[buy now]")
    assert (shopper.reward, shopper.over, shopper.info["won"]) == (1.0, True, True)
    assert shopper.info["score"] == 1.0
    assert shopper.info["admissible_actions"] == ()
    assert len(shopper.parts) == 33
    # A value of two options belongs to the last.
    assert shopper.parts[4:9] == ["Purchased", "asin", "B000000000", "options", '{"shade": "red"}']
    assert shopper.parts[-4:] == ["Your score (min 0.0, max 1.0)", "1.0", "Reward Details", "None"]


def test_a_half_right_purchase_is_scored_and_not_won(shopper):
    shopper("search[lamp]", "click[b000000000]", "click[buy now]")
    assert shopper.reward == pytest.approx(2 / 3)
    assert (shopper.over, shopper.info["won"]) == (True, False)


def test_after_the_end_nothing_changes_any_more(shopper):
    bought = shopper("search[lamp]", "click[b000000000]", "click[buy now]").text
    for action in ("search[lamp]", "click[buy now]"):
        shopper(action)
        assert (shopper.text, shopper.reward, shopper.over) == (bought, 0.0, True)
        assert not shopper.info["is_action_valid"]


def test_options_in_the_purchase_are_sorted_and_escaped():
    page = done_page("B1", {"z": "a<b>&'c'", "a": "é"}, 0.5)
    assert '{"a": "\\u00e9", "z": "a\\u003cb\\u003e\\u0026\\u0027c\\u0027"}' in [
        part.text for part in page.parts
    ]


@pytest.mark.parametrize(
    ("action", "valid"),
    [
        ("search[lamp]", True),
        ("search[lamp] and more", True),
        ("search[a [b]]", False),  # the name is "search[a "
        ("search[a]]", True),
        ("search[<r>]", True),
        ("search[]", False),
        ("Search[lamp]", False),
        ("search [lamp]", False),
        (" search[lamp]", False),
        ("search[lamp", False),
        ("click[search]", False),
        ("click[b000000000]", False),
        ("click[]", False),
        ("", False),
        ("buy", False),
        ("\n", False),
    ],
)
def test_actions_are_taken_in_upstreams_exact_form(shopper, action, valid):
    before = shopper.text
    assert shopper(action).info["is_action_valid"] is valid
    assert (shopper.text != before) is valid


@pytest.mark.parametrize(
    "action", ["click [ next > ]", "CLICK[ Next >]", "click[next > ]", "search [ lamp ]"]
)
def test_blanks_around_words_are_taken_off_where_that_is_asked_for(odd_folder, action):
    assert Shopper(odd_folder, exact_actions=False)("search[lamp]", action).info["is_action_valid"]


@pytest.mark.parametrize("exact", [True, False])
def test_a_run_of_blanks_in_a_click_counts_as_one(odd_folder, exact):
    """A value of the data has two blanks, which no response can hold: prompts read one."""
    shopper = Shopper(odd_folder, exact_actions=exact)("search[lamp]", "click[b000000002]")
    assert "click[blue | 'green']" in shopper.info["admissible_actions"]
    for action in ("click[blue | 'green']", "click[blue  |  'green']"):
        assert shopper(action).info["is_action_valid"]
    assert shopper("click[ features]").info["is_action_valid"] is not exact


def test_a_search_is_listed_in_whole_where_that_is_asked_for(odd_folder):
    shopper = Shopper(odd_folder, suggest_search=True)
    assert shopper.info["admissible_actions"] == ("search[i need a bright lamp]",)
    assert shopper(*shopper.info["admissible_actions"]).parts[3].startswith("Page 1")


def test_search_works_on_every_page_and_forgets_the_options(shopper):
    shopper("search[lamp]", "click[b000000000]", "click[red]", "search[lamp 3]")
    assert shopper.parts[3] == "Page 1 (Total results: 12)"


def test_words_that_were_commands_upstream_are_searched_for(shopper):
    for word in ("<r>", "<a>", "<c>", "<q>"):
        assert shopper(f"search[{word} lamp]").parts[3] == "Page 1 (Total results: 12)"


def test_the_rich_mode_marks_buttons_and_what_was_clicked(odd_folder):
    shopper = Shopper(odd_folder, observation="text_rich", show_instruction=False)
    assert shopper.text == "WebShop\n[button] Search [button_]\n"
    shopper("search[lamp 2]", "click[b000000002]", "click[blue  |  'green']")
    assert shopper.text == (
        "You have clicked blue  |  'green'.\n[button] Back to Search [button_]\n"
        "[button] < Prev [button_]\ncolor\n  [button] red [button_]\n"
        "  [clicked button] blue  |  'green' [clicked button_]\n"
        "shade\n  [button] red [button_]\n  [button] features [button_]\n"
        "Lamp 2\nPrice: $12.5\nRating: N.A.\n[button] Description [button_]\n"
        "[button] Features [button_]\n[button] Reviews [button_]\n[button] Buy Now [button_]\n"
    )
    shopper("click[< prev]")
    assert "\n\n[clicked button] B000000002 [clicked button_]\nLamp 2\n$12.5\n" in shopper.text
    assert "\n\n[button] B000000003 [button_]\nLamp 3\n" in shopper.text


ODD_VALUES = [
    *(
        "1 Pack [2 Count]",
        "[",
        "]",
        "a] [b",
        "x [",
        "tail]",
        "[[a]",
        "a[b[c",
        "] now [",
        "Ünï 毛巾 ［ÿ］",
    ),
    *(" /ends in blanks/ ", "two\nlines [of it]", "no\u00a0break", "İ ΑΣ ẞ", "line\u2028end"),
    *("Buy Now", "Reviews", "< Prev", "Next >", "Attributes", "Back to Search", "Search", " ", ""),
]
BUTTONS_OF_AN_ITEM = {"buy now": "done", "reviews": "sub", "< prev": "results"}
BUTTONS_OF_AN_ITEM |= {"back to search": "search"}


@pytest.fixture(scope="module")
def bracket_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("brackets")
    options = {"Count [of]": [{"value": value} for value in ODD_VALUES]}
    rows = [{**ROWS[0], "customization_options": options}]
    wish = {**HUMAN["B000000000"][0], "instruction": "A [bright] lamp [\nor two]"}
    contents = {
        "items_shuffle": rows,
        "items_ins_v2": {},
        "items_human_ins": {"B000000000": [wish]},
    }
    for name, content in contents.items():
        (root / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return prepare_catalogue(CatalogueFiles(root, nouns="given"), progress=False)


@pytest.mark.parametrize("exact", [True, False])
def test_whatever_is_offered_can_be_done(bracket_folder, exact):
    item = ("search[lamp]", "click[b000000000]")
    shopper = Shopper(bracket_folder, exact_actions=exact)(*item)
    offered = shopper.info["admissible_actions"]
    assert len(set(offered)) == len(offered) == 6 + 15 + 2  # buttons; odd values; two names more
    for action in offered:
        assert shopper.env.step(action)[-1]["is_action_valid"], action
        name = action[len("click[") : -1]
        expected = BUTTONS_OF_AN_ITEM.get(
            name, "sub" if name in ("description", "features") else "item"
        )
        assert shopper.env._session.place == expected, action
        if expected == "item":  # as it stands in the data, with its blanks
            (value,) = shopper.env._session.chosen.values()
            assert " ".join(value.split()) == name
            assert value in [v.strip().replace("/", " | ").lower() for v in ODD_VALUES]
        shopper = Shopper(bracket_folder, exact_actions=exact)(*item)


def test_a_value_is_taken_as_it_is_shown_and_as_a_response_spells_it(bracket_folder):
    shopper = Shopper(bracket_folder)("search[lamp]", "click[b000000000]")
    for action in (
        "click[ | ends in blanks | ]",
        "click[1 PACK [2 Count]]",
        "click[two\nlines [of it]]",
    ):
        assert shopper(action).info["is_action_valid"], action
    for action in ("click[ tail]]", "click[1 pack [2 count]", "say click[1 pack [2 count]]"):
        assert not shopper(action).info["is_action_valid"], action


def test_a_listed_search_with_brackets_finds_and_others_stay_upstreams(bracket_folder):
    shopper = Shopper(bracket_folder, suggest_search=True)
    (listed,) = shopper.info["admissible_actions"]
    assert listed == "search[A [bright] lamp [ or two]]"
    assert not shopper("search[a [bright] lamp]").info["is_action_valid"]
    assert shopper(listed).parts[3] == "Page 1 (Total results: 1)"


def test_settings_of_the_pages_are_followed(odd_folder):
    shopper = Shopper(odd_folder, show_instruction=False, separator=" ; ", results_per_page=3)
    assert shopper.text == "WebShop ; Search"
    assert len(shopper("search[lamp]").text.split(" ; ")) == 3 + 9
    assert shopper("click[next >]").info["is_action_valid"]


def test_a_page_without_words_is_empty_in_both_modes():
    page = Page((Part("  "), Part("")))
    assert (page.render("text", " | "), page.render("text_rich", " | ")) == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"observation": "html"}, "allowed: text, text_rich"),
        ({"results_per_page": 0}, "at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(odd_folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        WebShopEnv(odd_folder, **arguments)


@pytest.mark.parametrize("given_id", [None, "goal/1", "goal/0000001", "x", 3])
def test_a_goal_that_there_is_not_is_refused_with_those_that_there_are(odd_folder, given_id):
    with pytest.raises(ValueError, match="from 'goal/0000000' to 'goal/0000000'"):
        WebShopEnv(odd_folder).reset(options={"task_id": given_id})


def test_a_folder_without_a_catalogue_says_what_makes_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="prepare_data"):
        WebShopEnv(tmp_path)


def test_a_step_before_a_reset_is_an_error(odd_folder):
    with pytest.raises(RuntimeError, match="step before reset"):
        WebShopEnv(odd_folder).step("search[lamp]")


def test_the_contract_of_environments_is_kept():
    tasks = [Task(task_id(number)) for number in range(0, 500, 50)]
    check_env(partial(WebShopEnv, shop_folder("medium"), observation="text_rich"), tasks, turns=20)


def test_workers_map_the_catalogue_in_place_of_loading_it():
    folder = shop_folder("easy")
    with EnvPool(partial(WebShopEnv, folder), workers=2) as pool:
        requests = {str(i): ResetRequest(task_id(i), 0, i) for i in range(4)}
        pool.reset(requests)
        steps = pool.step({key: "search[easy clean tent]" for key in requests})
        assert len({step.observation.split("Back to Search")[1] for step in steps.values()}) == 1
        for pid in pool.worker_pids():
            with open(f"/proc/{pid}/maps") as maps:
                mapped = maps.read()
            assert "products.json.bin" in mapped
            assert "index/documents.npy" in mapped
