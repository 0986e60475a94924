import gzip
import shutil
from pathlib import Path

import pytest

from aem_lightning.datamodules import WebShopDataModule
from aem_lightning.envs.webshop import WebShopEnv
from aem_lightning.envs.webshop.expert import _listings
from aem_lightning.modules import build_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A shop with goals enough for upstream's splits."""
    root = tmp_path_factory.mktemp("shop")
    datamodule = WebShopDataModule(
        str(root), generate={"products": 700}, nouns="given", evaluation_splits=["test"]
    )
    datamodule.prepare_data()
    return datamodule


def test_the_splits_share_no_goal_by_number_and_none_by_content(made):
    catalogue = made.catalogue
    seen = {}
    for split in ("test", "dev", "train"):
        for task in made.tasks(split):
            goal = catalogue.goal(int(task.id[5:]))
            content = (goal.product, tuple(goal.attributes), tuple(goal.option_values))
            assert content not in seen
            seen[content] = task.id
    assert len(seen) == len(set(seen.values())) == catalogue.num_goals
    assert [len(made.tasks(split)) for split in ("test", "dev")] == [500, 1000]


def test_tasks_are_sorted_and_typed_by_category(made):
    tasks = made.tasks("train")
    assert [task.id for task in tasks] == sorted(task.id for task in tasks)
    assert {task.split for task in tasks} == {"train"}
    assert made.task_types() == [
        *("beauty", "electronics", "fashion", "garden", "kitchen", "outdoor"),
    ]


def test_verl_agents_splits_go_by_their_own_name(made):
    datamodule = WebShopDataModule(
        str(made.files.root), nouns="given", splits="verl_agent", evaluation_splits=["val"]
    )
    datamodule.prepare_data()
    val, train = (datamodule.tasks(split) for split in ("val", "train"))
    assert [task.id for task in val] == [task.id for task in made.tasks("test")]
    assert len(train) == made.catalogue.num_goals - 500
    assert not {task.id for task in val} & {task.id for task in train}
    with pytest.raises(
        ValueError, match=r"has: val, train\. Type datamodule\.evaluation_splits=\[val\]"
    ):
        datamodule.tasks("test")


def test_splits_that_are_the_same_have_the_same_hash(made):
    settings = {"nouns": "given", "splits": "verl_agent", "evaluation_splits": ["val"]}
    datamodule = WebShopDataModule(str(made.files.root), **settings)
    other = WebShopDataModule(str(made.files.root), **settings, goal_seed=1)
    ours, theirs = made.game_hashes(), datamodule.game_hashes()
    assert ours["test"] == theirs["val"]
    assert ours["train"] != theirs["train"]
    assert other.game_hashes()["val"] != theirs["val"]


def test_environment_and_expert_play_a_listed_task(made):
    made.environment = {"show_instruction": False}
    task = made.tasks("train")[0]
    env, expert = made.env_factory()(), made.make_expert(task, 0)
    assert isinstance(env, WebShopEnv)
    observation, info = env.reset(options={"task_id": task.id})
    over = False
    while not over:
        observation, _, over, _, info = env.step(
            expert.act(observation, info["admissible_actions"])
        )
    assert info["won"]


def test_the_fallbacks_nouns_show_in_the_task_types_and_in_info(made, caplog):
    splits = {"test": [0, 10], "train": [10, None]}
    datamodule = WebShopDataModule(
        str(made.files.root), nouns="fallback", splits=splits, evaluation_splits=["test"]
    )
    datamodule.prepare_data()
    assert "rewards are not those of spaCy's nouns" in caplog.text
    assert all(kind.endswith("_fallback_nouns") for kind in datamodule.task_types())
    info = datamodule.env_factory()().reset(options={"task_id": "goal/0000000"})[1]
    assert info["noun_tagger"] == "fallback"


@pytest.mark.parametrize("mode", ["text", "text_rich"])
@pytest.mark.parametrize("separator", [" [SEP] ", " ; "])
def test_the_vocabulary_has_every_word_that_an_expert_sees_and_says(made, mode, separator):
    made.environment = {"observation": mode, "separator": separator, "exact_actions": False}
    tokenizer = build_tokenizer(made.vocabulary())
    env = made.env_factory()()
    for task in made.tasks("test")[:25]:
        observation, info = env.reset(options={"task_id": task.id})
        expert, over = made.make_expert(task, 0), False
        while not over:
            action = expert.act(observation, info["admissible_actions"])
            for text in (observation, action, *info["admissible_actions"], info["goal"]):
                assert tokenizer.unk_token_id not in tokenizer(text).input_ids, text
            said = tokenizer.decode(tokenizer(action).input_ids)
            observation, _, over, _, info = env.step(said)
            assert info["is_action_valid"], said
        assert info["won"]


def test_a_catalogue_of_goals_too_few_says_what_to_type(tmp_path):
    datamodule = WebShopDataModule(str(tmp_path), generate={"products": 100}, nouns="given")
    datamodule.prepare_data()
    with pytest.raises(ValueError, match=r"leaves dev, train empty.*generate\.products"):
        datamodule.tasks("train")


def test_missing_official_files_say_how_to_do_without(tmp_path):
    datamodule = WebShopDataModule(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"WEBSHOP_DATA.*datamodule=webshop_generated"):
        datamodule.prepare_data()


def test_the_expert_reads_price_ranges_and_titles_that_name_a_price():
    page = (
        "Next > [SEP] B000000001 [SEP] Lamp for $5 [SEP] $12.5 to $20.0 [SEP] "
        "B000000002 [SEP] Lamp 2 [SEP] $3.0"
    )
    assert dict(_listings(page, ["click[next >]", "click[b000000001]", "click[b000000002]"])) == {
        "b000000001": ("Lamp for $5", "$12.5 to $20.0"),
        "b000000002": ("Lamp 2", "$3.0"),
    }


GENUINE = Path(__file__).parents[3] / "shared" / "real" / "webshop"


@pytest.mark.skipif(not GENUINE.is_dir(), reason="the official products are not at hand")
def test_genuine_synthetic_goals_are_all_there_and_the_expert_wins_most(tmp_path):
    names = {"products": "items_shuffle_1000.json", "attributes": "items_ins_v2_1000.json"}
    packed = (GENUINE / f"{names['products']}.gz").read_bytes()
    (tmp_path / names["products"]).write_bytes(gzip.decompress(packed))
    shutil.copy(GENUINE / names["attributes"], tmp_path)
    datamodule = WebShopDataModule(
        str(tmp_path), **names, goals="synthetic", nouns="fallback", evaluation_splits=["test"]
    )
    datamodule.prepare_data()
    assert datamodule.catalogue.num_goals == 6910
    tasks = datamodule.tasks("train")[::50]
    env = datamodule.env_factory()()
    won = 0
    for task in tasks:
        expert = datamodule.make_expert(task, 0)
        observation, info = env.reset(options={"task_id": task.id})
        over, turns = False, 0
        while not over and turns < 15:
            action = expert.act(observation, info["admissible_actions"])
            observation, _, over, _, info = env.step(action)
            turns += 1
        won += info["won"]
    assert len(tasks) > 100
    assert won > 0.7 * len(tasks)
