"""The official generator and the official wrappers beside ours, on a genuine scene and on ours."""

import importlib.util
import json
import random
import shutil
import sys
from argparse import Namespace
from functools import partial
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest
from alfworld_folders import games_root

from aem_lightning.envs import EnvPool, ResetRequest
from aem_lightning.envs.alfworld import TASK_TYPES, AlfworldEnv, list_games
from aem_lightning.envs.alfworld.engine import BANNER
from aem_lightning.envs.alfworld.package import import_optional

GENUINE = Path(__file__).parents[3] / "shared" / "real" / "alfworld"
SCENE = "valid_seen/pick_heat_then_place_in_recep-Potato-None-SinkBasin-14"
TRIAL = "trial_T20190908_231731_054988"
genuine = pytest.mark.skipif(not GENUINE.is_dir(), reason="the genuine scene is not at hand")


def official_files(root, monkeypatch, *, human):
    """The folder of the genuine scene, its game made by ``alfworld-generate``."""
    folder = root / "json_2.1.1" / SCENE / TRIAL
    folder.mkdir(parents=True)
    for name in ("traj_data.json", "initial_state.pddl"):
        shutil.copy(GENUINE / name, folder)
    package = Path(import_optional("alfworld").__file__).parent / "data"
    monkeypatch.setenv("ALFWORLD_DATA", str(root))
    path = Path(sys.executable).with_name("alfworld-generate")
    spec = importlib.util.spec_from_loader("generate", SourceFileLoader("generate", str(path)))
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    games = str(root / "json_2.1.1")
    script.gen_game_files(
        Namespace(
            data_path=games,
            save_path=games,
            domain=str(package / "alfred.pddl"),
            grammar=str(package / "alfred.twl2"),
            expert_type="handcoded",
            verbose=False,
            start=0,
            end=None,
            goal_desc_human_anns_prob=float(human),
            seed=20240229,
        )
    )
    return root


def official_engine():
    """The plain engine in the wrappers that the official environment puts around it."""
    textworld = import_optional("textworld")
    pddl = import_optional("textworld.envs")
    wrappers = import_optional("alfworld.agents.environment.alfred_tw_env")
    wanted = textworld.EnvInfos(won=True, admissible_commands=True, extras=["gamefile"])
    return wrappers.AlfredInfos(wrappers.AlfredDemangler(pddl.PddlEnv(wanted), shuffle=False))


def record(state, done):
    shown = state.feedback.removeprefix(BANNER)
    return shown, tuple(state["admissible_commands"]), bool(state["won"]), bool(done)


def official_walks(game, steps):
    """The walkthrough, then ``steps`` random actions from the start: actions and records."""
    engine = official_engine()
    engine.load(str(game.path))
    walks = []
    rng = random.Random(game.id)
    for walkthrough in (game.walkthrough, None):
        records, actions = [record(engine.reset(), False)], []
        for turn in range(steps if walkthrough is None else len(walkthrough)):
            if records[-1][-1]:
                break
            offered = [*records[-1][1], "eat the moon"]
            action = rng.choice(offered) if walkthrough is None else walkthrough[turn]
            state, _, done = engine.step(action)
            actions.append(action)
            records.append(record(state, done))
        walks.append((actions, records))
    engine.close()
    return walks


def our_records(pool, game, actions):
    answer = pool.reset({"a": ResetRequest(game.id)})["a"]
    records = []
    for action in (*actions, None):
        seen = (answer.observation, answer.admissible_actions, answer.won, answer.terminated)
        records.append(seen)
        if action is not None:
            answer = pool.step({"a": action})["a"]
    return records


def assert_equal_records(root, games, steps, goals="template"):
    with EnvPool(partial(AlfworldEnv, root, goals=goals), workers=1) as pool:
        for game in games:
            walks = official_walks(game, steps)
            assert walks[0][1][-1][2], f"the walkthrough of {game.id} does not win"
            for actions, records in walks:
                assert our_records(pool, game, actions) == records, game.id


# The plain engine takes a twentieth of a second for a step of an official game.
@genuine
@pytest.mark.parametrize(
    ("human", "steps"),
    [
        (True, 10),
        pytest.param(True, 200, marks=pytest.mark.soak),
        pytest.param(False, 200, marks=pytest.mark.soak),
    ],
)
def test_the_genuine_scene_shows_here_what_the_official_wrappers_show(
    human, steps, tmp_path, monkeypatch
):
    root = official_files(tmp_path, monkeypatch, human=human)
    (game,) = list_games(root, "valid_seen")
    said = json.loads((GENUINE / "traj_data.json").read_text())["turk_annotations"]["anns"]
    assert (game.goal in [one["task_desc"] for one in said]) is human
    assert game.params["task_type"] == "pick_heat_then_place_in_recep"
    assert_equal_records(root, [game], steps)
    if human:  # our words in place of theirs, in a game whose own words are the template's
        path = game.path.with_name("traj_data.json")
        about = json.loads(path.read_text())
        about["turk_annotations"]["anns"] = [{"task_desc": game.goal}]
        path.write_text(json.dumps(about))
        plain = json.loads(game.path.read_text())
        with EnvPool(partial(AlfworldEnv, root), workers=1) as pool:
            expected = our_records(pool, game, ["look"])
        plain["grammar"] = plain["grammar"].replace(game.goal, "put a hot potato in sinkbasin")
        game.path.write_text(json.dumps(plain))
        with EnvPool(partial(AlfworldEnv, root, goals="human"), workers=1) as pool:
            assert our_records(pool, game, ["look"]) == expected
            assert pool.step({"a": "look"})["a"].info["goal"] == game.goal


@pytest.mark.soak
def test_generated_games_show_here_what_the_official_wrappers_show():
    """Of each task type."""
    root = games_root("easy")
    games = list_games(root, "valid_unseen")
    assert {game.task_type for game in games} == set(TASK_TYPES)
    assert_equal_records(root, games, 200)
