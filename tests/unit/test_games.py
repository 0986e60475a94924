import json
import logging

import pytest

from aem_lightning.envs.alfworld import check_folder, games_hash, list_games

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


def _annotate(root, name, said, split="train"):
    path = root / "json_2.1.1" / split / name / "trial_1" / "traj_data.json"
    about = json.loads(path.read_text())
    about["turk_annotations"] = {"anns": [{"task_desc": sentence} for sentence in said]}
    path.write_text(json.dumps(about))


def test_human_goals_are_one_annotation_of_each_game_and_another_set_of_games(root):
    said = ["Put the mug away. ", "Shelve it, please."]
    for number in (2, 9, 10):
        _annotate(root, NAME.format(number), said if number != 9 else [" ", "Mug \\1, shelf."])
    games = list_games(root, "train", goals="human")
    assert games == list_games(root, "train", goals="human")
    assert {game.goal for game in games[:2]} <= set(said)
    assert games[2].goal == "Mug \\1, shelf."
    assert games_hash(games) != games_hash(list_games(root, "train"))
    with pytest.raises(ValueError, match="goals='spoken'; allowed: template, human"):
        list_games(root, "train", goals="spoken")


def test_a_game_that_nobody_annotated_is_named_with_what_to_type(root):
    with pytest.raises(ValueError, match=r"train/.*Shelf-10/trial_1 has no annotation.*=template"):
        list_games(root, "train", goals="human")


def test_a_folder_is_checked_as_a_whole_against_the_published_counts(root, caplog):
    _write(root, "pick_and_place_with_movable_recep-Mug-Bowl-Shelf-1")
    _write(root, NAME.format(3), solvable=False)
    (_write(root, NAME.format(4)) / "game.tw-pddl").write_text("{")
    (_write(root, NAME.format(5)) / "game.tw-pddl").unlink()
    (_write(root, NAME.format(6)) / "traj_data.json").unlink()
    _write(root, NAME.format(7), split="valid_seen")
    with caplog.at_level(logging.INFO):
        found = check_folder(root)
    digest = games_hash(list_games(root, "train"))
    assert (
        f"train: 3 of 8 games can be played, hash {digest}; left out: 1 broken, 1 unsolvable, "
        "1 with movable receptacles or sliced objects, 1 without a game file, "
        "1 without traj_data.json" in caplog.messages
    )
    (warning,) = [text for text in caplog.messages if "published" in text]
    assert "(train has 3 of 3553, valid_seen has 1 of 140, valid_unseen has 0 of 134)" in warning
    assert f"ALFWORLD_DATA={root} alfworld-download" in warning
    assert list_games(root, "train", found=found["train"]) == list_games(root, "train")


def test_a_folder_with_the_published_counts_is_not_warned_of(root, caplog, monkeypatch):
    for split in ("valid_seen", "valid_unseen"):
        _write(root, NAME.format(7), split=split)
    published = {"train": 3, "valid_seen": 1, "valid_unseen": 1}
    monkeypatch.setattr("aem_lightning.envs.alfworld.games.PUBLISHED", published)
    check_folder(root)
    assert "published" not in caplog.text
