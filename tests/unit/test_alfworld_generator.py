import json
import shutil
import textwrap
from functools import partial

import pytest
from alfworld_folders import SIZES, games_root
from runs import COMMAND_ENVIRONMENT, process

from aem_lightning.envs import EnvPool, ResetRequest
from aem_lightning.envs.alfworld import (
    SPLITS,
    TASK_TYPES,
    AlfworldEnv,
    generate_games,
    generator,
    list_games,
)
from aem_lightning.envs.alfworld.package import load_kit
from aem_lightning.envs.alfworld.problem import plan_game
from aem_lightning.envs.alfworld.scenes import DIFFICULTIES, build_scene

# Each game is proved on the plain engine: a second of a processor.
SMALL = {"sizes": {"train": 2, "valid_seen": 1}, "difficulty": "easy", "seed": 3}


def _content(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    generate_games(root, **SMALL)
    return root


def test_equal_parameters_give_equal_bytes_whatever_the_number_of_workers(small, tmp_path):
    generate_games(tmp_path, **SMALL, workers=2)
    assert _content(tmp_path) == _content(small)


def test_another_seed_gives_other_games(small, tmp_path):
    generate_games(tmp_path, **(SMALL | {"seed": 4}))
    assert not set(_content(tmp_path)) & {n for n in _content(small) if n.endswith("game.tw-pddl")}


def test_size_of_the_train_split_leaves_the_validation_games_alone(small, tmp_path):
    generate_games(tmp_path, **(SMALL | {"sizes": {"train": 3, "valid_seen": 1}}))
    for split in ("train", "valid_seen"):
        before = [game.id for game in list_games(small, split)]
        assert set(before) <= {game.id for game in list_games(tmp_path, split)}


def test_every_task_type_is_there_and_every_walkthrough_wins_on_the_plain_engine():
    root = games_root("easy")
    games = list_games(root, "valid_unseen")
    assert {game.task_type for game in games} == set(TASK_TYPES)
    with EnvPool(partial(AlfworldEnv, root, cached=False), workers=2, timeout_s=120) as pool:
        steps = pool.reset({g.id: ResetRequest(g.id, 0, i) for i, g in enumerate(games)})
        left = {game.id: list(game.walkthrough) for game in games}
        while left:
            assert not any(steps[key].won for key in left)
            assert all(left[key][0] in steps[key].admissible_actions for key in left)
            steps |= pool.step({key: actions.pop(0) for key, actions in left.items()})
            left = {key: actions for key, actions in left.items() if actions}
        assert all(step.won and step.terminated and step.reward == 1.0 for step in steps.values())


def test_unseen_scenes_are_disjoint_and_no_start_state_is_in_two_splits():
    scenes, problems = {}, {}
    for split in SPLITS:
        games = list_games(games_root("easy"), split)
        assert len(games) == SIZES[split]
        scenes[split] = {int(game.id.split("/")[1].rpartition("-")[2]) for game in games}
        problems[split] = {json.loads(game.path.read_text())["pddl_problem"] for game in games}
    assert not scenes["valid_unseen"] & (scenes["train"] | scenes["valid_seen"])
    train = set(range(1, 25)) | set(range(201, 225)) | set(range(301, 325)) | set(range(401, 425))
    assert scenes["train"] | scenes["valid_seen"] <= train
    assert not problems["train"] & problems["valid_seen"]


def test_layout_depends_on_the_scene_alone_and_the_seed_places_objects():
    kit = load_kit()
    scene = build_scene("Kitchen", 3, 10)
    assert scene == build_scene("Kitchen", 3, 10)
    assert scene != build_scene("Kitchen", 4, 10)
    plans = [
        plan_game(kit, TASK_TYPES[0], scene, DIFFICULTIES["medium"], (seed,)) for seed in range(2)
    ]
    assert plans[0].items != plans[1].items


def test_second_call_with_equal_parameters_makes_nothing(small, monkeypatch):
    monkeypatch.setattr(generator, "EnvPool", None)  # a call would raise
    paths = generate_games(small, **SMALL)
    assert len(paths) == 3
    assert all(path.is_file() for path in paths)


def test_folder_that_lost_a_file_is_made_whole_again(small, tmp_path):
    shutil.copytree(small, tmp_path, dirs_exist_ok=True)
    paths = generate_games(tmp_path, **SMALL)
    paths[1].unlink()
    assert generate_games(tmp_path, **SMALL) == paths
    assert _content(tmp_path) == _content(small)


def test_failure_on_the_way_leaves_no_half_written_folder(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(generator, "_failures", fail)
    with pytest.raises(OSError, match="disk full"):
        generate_games(tmp_path, **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_game_that_fails_on_the_engine_is_made_again_and_counted(tmp_path, monkeypatch, small):
    honest = generator.game_files

    def game_files(kit, plan):
        files = honest(kit, plan)
        if plan.seed == (3, "train", 1, 0):
            game = json.loads(files["game.tw-pddl"])
            game["pddl_problem"] = game["pddl_problem"].replace("(pickupable", "(moveable")
            files["game.tw-pddl"] = json.dumps(game)
        return files

    monkeypatch.setattr(generator, "game_files", game_files)
    paths = generate_games(tmp_path, **SMALL)
    manifest = json.loads((tmp_path / "json_2.1.1" / "manifest.json").read_text())
    assert manifest["rejected"] == 1
    assert len(set(_content(tmp_path)) - set(_content(small))) == 3  # one game's files
    assert len(list((tmp_path / "json_2.1.1" / "train").glob("*/*"))) == 2
    assert len(paths) == 3


def test_folder_with_other_games_is_left_alone(small, tmp_path):
    with pytest.raises(ValueError, match="other parameters"):
        generate_games(small, **(SMALL | {"seed": 5}))
    game = tmp_path / "json_2.1.1" / "train" / "x" / "trial_y" / "game.tw-pddl"
    game.parent.mkdir(parents=True)
    game.write_text("{}")
    with pytest.raises(ValueError, match="did not make"):
        generate_games(tmp_path, **SMALL)
    assert game.read_text() == "{}"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"sizes": {"test": 3}}, "train, valid_seen, valid_unseen"),
        ({"sizes": {}}, "sizes"),
        ({"sizes": {"train": -1}}, "sizes"),
        ({"difficulty": "extreme"}, "easy, hard, medium"),
        ({"task_types": ["juggle"]}, "pick_and_place_simple"),
        ({"train_scenes": 30}, "1 to 29"),
    ],
)
def test_parameter_out_of_range_is_refused_with_what_is_allowed(bad, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        generate_games(tmp_path / "new", **(SMALL | bad))
    assert not (tmp_path / "new").exists()


def test_upstreams_own_reader_lists_the_same_games(small):
    script = f"""
        from alfworld.agents.environment.alfred_tw_env import AlfredTWEnv
        config = {{
            "env": {{"goal_desc_human_anns_prob": 0, "task_types": [1, 2, 3, 4, 5, 6]}},
            "dataset": {{"data_path": r"{small}/json_2.1.1/train", "num_train_games": -1}},
        }}
        print("GAMES", *AlfredTWEnv(config).game_files)
    """
    environment = {**COMMAND_ENVIRONMENT, "ALFWORLD_DATA": str(small)}
    done = process("-c", textwrap.dedent(script), env=environment)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("GAMES"))
    assert sorted(line.split()[1:]) == [str(game.path) for game in list_games(small, "train")]
