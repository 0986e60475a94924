import json

import pytest

from aem_lightning.envs.alfworld import games_hash, list_games

NAME = "pick_and_place_simple-Mug-None-Shelf-{}"


def _write(root, name, *, trial="trial_1", split="train", solvable=True, goal="put a mug in shelf"):
    folder = root / "json_2.1.1" / split / name / trial
    folder.mkdir(parents=True)
    params = {"object_target": "Mug", "parent_target": "Shelf", "toggle_target": ""}
    about = {"task_type": name.partition("-")[0], "pddl_params": params}
    (folder / "traj_data.json").write_text(json.dumps(about))
    grammar = f'"task": [\n{{\n"rhs": "Your task is to: {goal}."\n}}\n]'
    game = {"grammar": grammar, "solvable": solvable, "walkthrough": ["look"]}
    if solvable is None:
        del game["solvable"]
    (folder / "game.tw-pddl").write_text(json.dumps(game))
    return folder


@pytest.fixture
def root(tmp_path):
    for number in (9, 10, 2):
        _write(tmp_path, NAME.format(number))
    return tmp_path


def test_games_come_sorted_by_id_with_their_goal_and_parameters(root):
    games = list_games(root, "train")
    assert [game.id for game in games] == [
        f"train/{NAME.format(number)}/trial_1" for number in (10, 2, 9)
    ]
    assert games[0].goal == "put a mug in shelf"
    assert games[0].params["task_type"] == "pick_and_place_simple"
    assert games[0].task.type == "pick_and_place_simple"
    assert games[0].walkthrough == ("look",)


def test_games_that_cannot_be_played_are_skipped(root):
    _write(root, "pick_and_place_with_movable_recep-Mug-Bowl-Shelf-1")
    _write(root, "pick_and_place_simple-AppleSliced-None-Shelf-1")
    _write(root, NAME.format(3), solvable=False)
    _write(root, NAME.format(4), solvable=None)
    (_write(root, NAME.format(5)) / "game.tw-pddl").unlink()
    (_write(root, NAME.format(6)) / "traj_data.json").unlink()
    assert len(list_games(root, "train")) == 3


def test_task_types_restrict_the_list(root):
    _write(root, "look_at_obj_in_light-Mug-None-DeskLamp-1", goal="look at mug under the desklamp")
    (game,) = list_games(root, "train", task_types=["look_at_obj_in_light"])
    assert game.goal == "look at mug under the desklamp"


def test_hash_depends_on_names_and_contents_and_not_on_the_order(root):
    games = list_games(root, "train")
    before = games_hash(games)
    assert games_hash(reversed(games)) == before
    assert games_hash(games[1:]) != before
    path = games[0].path
    path.write_text(path.read_text().replace("put a mug in", "put a mug on"))
    assert games_hash(list_games(root, "train")) != before


def test_missing_folder_is_told_with_the_command_and_the_override(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        list_games(tmp_path / "nowhere", "valid_seen")
    for part in ("nowhere", "alfworld-download", "datamodule=alfworld_generated"):
        assert part in str(raised.value)


def test_empty_split_is_told(root):
    (root / "json_2.1.1" / "valid_seen").mkdir()
    with pytest.raises(ValueError, match=r"valid_seen has no playable game"):
        list_games(root, "valid_seen")
    with pytest.raises(ValueError, match=r"look_at_obj_in_light \(0 were"):
        list_games(root, "train", task_types=["look_at_obj_in_light"])


def test_unknown_split_or_task_type_is_refused_with_what_is_allowed(root):
    with pytest.raises(ValueError, match="train, valid_seen, valid_unseen"):
        list_games(root, "test")
    with pytest.raises(ValueError, match="pick_two_obj_and_place"):
        list_games(root, "train", task_types=["juggle"])
