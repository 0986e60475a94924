import random
import re
from contextlib import ExitStack
from functools import partial

import pytest
from alfworld_folders import games_root

from aem_lightning.envs import EnvPool, ResetRequest
from aem_lightning.envs.alfworld import (
    THOUGHTS,
    AlfworldEnv,
    SearchingExpert,
    list_games,
    vocabulary_texts,
)
from aem_lightning.modules.tiny import build_tokenizer

MAX_TURNS = 50
MUG_ON_SHELF = {
    "task_type": "pick_and_place_simple",
    "object_target": "Mug",
    "parent_target": "Shelf",
    "toggle_target": "",
}


@pytest.fixture(scope="module")
def pools():
    """A pool a difficulty, which knows what earlier tests have played."""
    found = {}
    with ExitStack() as stack:
        for each in ("easy", "medium"):
            root = games_root(each)
            pool = stack.enter_context(EnvPool(partial(AlfworldEnv, root), workers=2))
            pool.reset({"a": ResetRequest(list_games(root, "train")[0].id)})
            pool.release("a")  # its workers have started outside any test, which would leave them
            found[each] = pool
        yield found


def _play(pool, games, *, seed=0, noise=0.0):
    """The actions of the expert in each game, and which games it won."""
    rng = random.Random(seed)
    experts = {game.id: SearchingExpert(game.params, seed) for game in games}
    actions = {game.id: [] for game in games}
    won = set()
    steps = pool.reset({g.id: ResetRequest(g.id, 0, i) for i, g in enumerate(games)})
    for _ in range(MAX_TURNS):
        sent = {}
        for key, step in steps.items():
            action = experts[key].act(step.observation, step.admissible_actions)
            assert action in step.admissible_actions
            is_noise = rng.random() < noise
            sent[key] = rng.choice(step.admissible_actions) if is_noise else action
            actions[key].append(sent[key])
        steps = pool.step(sent)
        won |= {key for key, step in steps.items() if step.won}
        steps = {key: step for key, step in steps.items() if not step.terminated}
        if not steps:
            break
    pool.release(actions)
    return actions, won


@pytest.mark.parametrize("difficulty", ["easy", "medium"])
def test_expert_wins_every_game_within_the_turn_limit(difficulty, pools):
    root = games_root(difficulty)
    games = list_games(root, "train") + list_games(root, "valid_unseen")
    _, won = _play(pools[difficulty], games)
    assert won == {game.id for game in games}


def test_expert_still_wins_when_a_third_of_its_actions_is_replaced_by_noise(pools):
    games = list_games(games_root("easy"), "train")
    _, won = _play(pools["easy"], games, noise=0.33)
    assert len(won) >= len(games) - 1


def test_expert_searches_in_the_order_of_its_seed(pools):
    games = list_games(games_root("medium"), "train")[:3]
    first, again, other = (_play(pools["medium"], games, seed=seed)[0] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_expert_does_not_know_what_it_has_not_seen():
    expert = SearchingExpert(MUG_ON_SHELF, 0)
    places = ["cabinet 1", "drawer 1", "shelf 1"]
    go = [f"go to {place}" for place in places]
    visited = []
    action = expert.act("You are in the middle of a room.", [*go, "look"])
    while len(visited) < 3:
        place = action.removeprefix("go to ")
        visited.append(place)
        action = expert.act(
            f"You arrive at {place}. On the {place}, you see nothing.", [*go, "look"]
        )
    assert sorted(visited) == places


def test_expert_opens_what_is_closed_and_takes_what_it_sees():
    expert = SearchingExpert(MUG_ON_SHELF, 0)
    expert.act("You are in a room.", ["go to drawer 1", "look"])
    allowed = ["go to drawer 1", "open drawer 1", "look"]
    action = expert.act("You arrive at drawer 1. The drawer 1 is closed.", allowed)
    assert action == "open drawer 1"
    seen = "You open the drawer 1. The drawer 1 is open. In it, you see a cup 1, and a mug 2."
    allowed = ["go to drawer 1", "take cup 1 from drawer 1", "take mug 2 from drawer 1"]
    assert expert.act(seen, allowed) == "take mug 2 from drawer 1"


LAMP = {
    "task_type": "look_at_obj_in_light",
    "object_target": "Book",
    "parent_target": "",
    "toggle_target": "DeskLamp",
}
CLEAN_MUG = {**MUG_ON_SHELF, "task_type": "pick_clean_then_place_in_recep"}
ROOM = ("go to desk 1", "go to shelf 1", "go to sinkbasin 1", "look")
TAKEN = "You pick up the {} from the desk 1."
AT_DESK = "You arrive at desk 1. On the desk 1, you see {}."


@pytest.mark.parametrize(
    ("params", "seen", "allowed", "thought"),
    [
        (MUG_ON_SHELF, [], [], "I look for the mug. I have not seen {next} yet."),
        (
            MUG_ON_SHELF,
            ["You arrive at desk 1. The desk 1 is closed."],
            ["open desk 1"],
            "I look for the mug. desk 1 is closed.",
        ),
        (
            MUG_ON_SHELF,
            [AT_DESK.format("a mug 2")],
            ["take mug 2 from desk 1"],
            "I need the mug. I saw mug 2 at desk 1.",
        ),
        (
            MUG_ON_SHELF,
            [TAKEN.format("mug 2")],
            [],
            "I hold mug 2. I have to bring it to shelf 1.",
        ),
        (
            MUG_ON_SHELF,
            [TAKEN.format("pen 1")],
            ["move pen 1 to desk 1"],
            "I do not need pen 1. I need the mug.",
        ),
        (
            CLEAN_MUG,
            [TAKEN.format("mug 2")],
            [],
            "I hold mug 2. I have to clean it with sinkbasin 1 first.",
        ),
        (
            LAMP,
            [AT_DESK.format("a book 1, and a desklamp 1"), TAKEN.format("book 1")],
            ["take book 1 from desk 1", "use desklamp 1"],
            "I hold book 1. I need desklamp 1, which I saw at desk 1.",
        ),
        (
            LAMP,
            [TAKEN.format("book 1")],
            [],
            "I look for the desklamp. I have not seen {next} yet.",
        ),
    ],
)
def test_expert_does_not_say_what_it_believes(params, seen, allowed, thought):
    expert = SearchingExpert(params, 0)
    action = expert.act("You are in a room.", ROOM)
    for observation in seen:
        action = expert.act(observation, [*ROOM, *allowed])
    assert expert.thought == thought.format(next=action.removeprefix("go to "))


def test_expert_says_nothing_or_much_before_it_acts(pools):
    root = games_root("easy")
    experts = {game.id: SearchingExpert(game.params, 0) for game in list_games(root, "train")}
    known = build_tokenizer([*vocabulary_texts(), *THOUGHTS])  # as of a tiny policy that thinks
    pool = pools["easy"]
    steps = pool.reset({key: ResetRequest(key, 0, i) for i, key in enumerate(experts)})
    while steps:
        sent = {
            key: experts[key].act(step.observation, step.admissible_actions)
            for key, step in steps.items()
        }
        for key in sent:
            thought = experts[key].thought
            assert 6 <= len(thought.split()) <= 14
            tokens = known.tokenize(thought)
            assert len(tokens) == len(re.findall(r"\w+|[^\w\s]", thought)), tokens
            assert 8 <= len(tokens) <= 26
        steps = {key: step for key, step in pool.step(sent).items() if not step.terminated}
    pool.release(experts)
