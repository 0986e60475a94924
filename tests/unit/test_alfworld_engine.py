import ctypes
import hashlib
import os
import random
import re
import signal
import textwrap
from functools import partial
from pathlib import Path

import pytest
from alfworld_folders import games_root
from runs import COMMAND_ENVIRONMENT, process

from aem_lightning.envs import EnvPool, ResetRequest
from aem_lightning.envs.alfworld import (
    TASK_TYPES,
    AlfworldEnv,
    SearchingExpert,
    list_games,
    vocabulary_texts,
)
from aem_lightning.envs.alfworld.library import trim

TURNS = 6
SHARED_TURNS = 3


def _choose(game, expert, turn, step, tail):
    """An action that depends on the game, the turn and, late in the walk, on ``tail``."""
    key = (game.id, turn, tail if turn >= SHARED_TURNS else "")
    rng = random.Random(hashlib.sha256(repr(key).encode()).digest())
    wise = expert.act(step.observation, step.admissible_actions)
    chance = rng.random()
    if chance < 0.1:
        return rng.choice(("eat the moon", " look ", "go to  nowhere 1", ""))
    return wise if chance < 0.6 else rng.choice(step.admissible_actions)


def _walk(pool, games, tail, *, harm=None):
    """Transcripts of one walk a game: the actions, and every answer."""
    experts = {game.id: SearchingExpert(game.params, 0) for game in games}
    steps = pool.reset({g.id: ResetRequest(g.id, 0, i) for i, g in enumerate(games)})
    actions = {game.id: [] for game in games}
    answers = {key: [step] for key, step in steps.items()}
    for turn in range(TURNS):
        if harm is not None:
            harm(turn)
        live = [game for game in games if not answers[game.id][-1].terminated]
        sent = {
            game.id: _choose(game, experts[game.id], turn, answers[game.id][-1], tail)
            for game in live
        }
        for key, step in pool.step(sent).items():
            actions[key].append(sent[key])
            answers[key].append(step)
    pool.release(actions)
    return actions, answers


def _repeat(pool, games, actions):
    """The answers to given actions, all of a walk, game by game."""
    answers = {}
    for start in range(0, len(games), 16):
        some = games[start : start + 16]
        steps = pool.reset({g.id: ResetRequest(g.id, 0, i) for i, g in enumerate(some)})
        answers |= {key: [step] for key, step in steps.items()}
        for turn in range(TURNS):
            due = {g.id: actions[g.id][turn] for g in some if turn < len(actions[g.id])}
            for key, step in pool.step(due).items():
                answers[key].append(step)
        pool.release(steps)
    return answers


def _assert_cached_equals_plain(root, games):
    """A scout shares the first turns of every walk, so that memory and engine take turns."""
    with EnvPool(partial(AlfworldEnv, root), workers=2) as cached:
        _walk(cached, games, "scout")
        actions, found = _walk(cached, games, "main")
    plain_env = partial(AlfworldEnv, root, cached=False)
    with EnvPool(plain_env, workers=2, timeout_s=300) as plain:
        expected = _repeat(plain, games, actions)
    for game in games:
        assert found[game.id] == expected[game.id], game.id
    said = [step.is_action_valid for steps in found.values() for step in steps[1:]]
    assert any(said)
    assert not all(said)


# The plain engine takes one to four seconds of a processor for a game, over two minutes for all 84.
QUICK, SLOW = ("easy", "train", 12), ("medium", "valid_seen", 6)  # a game of every type
ALL_84 = [("easy", "train", 48), ("medium", "train", 24), ("hard", "train", 12)]


@pytest.mark.parametrize(
    ("difficulty", "split", "number"),
    [
        QUICK,
        pytest.param(*SLOW, marks=pytest.mark.slow),
        *(pytest.param(*each, marks=pytest.mark.soak) for each in ALL_84),
    ],
)
def test_cached_engine_shows_what_the_plain_one_does_not(difficulty, split, number):
    root = games_root(difficulty, number if split == "train" else 12)
    games = list_games(root, split)
    assert len(games) == number
    assert {game.task_type for game in games} == set(TASK_TYPES)
    is_brief = (difficulty, split, number) in (QUICK, SLOW)  # the soak leaves none out of its 84
    _assert_cached_equals_plain(root, games[1::2] if is_brief else games)


def test_episodes_of_a_killed_worker_are_replayed_identically():
    root = games_root("easy")
    games = list_games(root, "train")[:6]
    with EnvPool(partial(AlfworldEnv, root), workers=2) as pool:
        undisturbed = _walk(pool, games, "main")

    def harm(turn):
        if turn in (1, 4):
            os.kill(pool.worker_pids()[turn % 2], signal.SIGKILL)

    with EnvPool(partial(AlfworldEnv, root), workers=2) as pool:
        assert _walk(pool, games, "main", harm=harm) == undisturbed
        assert pool.restarts == 2


def test_first_observation_has_room_and_goal_but_no_banner_and_info_has_the_reserved_keys():
    root = games_root("easy")
    game = list_games(root, "train")[0]
    with EnvPool(partial(AlfworldEnv, root), workers=1) as pool:
        step = pool.reset({"a": ResetRequest(game.id)})["a"]
        assert step.observation.startswith("You are in the middle of a room.")
        assert step.observation.endswith(f"Your task is to: {game.goal}.")
        assert step.info["goal"] == game.goal
        assert step.info["task_id"] == game.id
        assert (step.info["won"], step.info["score"]) == (False, 0.0)
        assert step.admissible_actions == tuple(sorted(step.admissible_actions))
        assert {"help", "inventory", "look"} <= set(step.admissible_actions)
        step = pool.step({"a": "eat the moon"})["a"]
        assert (step.observation, step.is_action_valid) == ("Nothing happens.", False)
        step = pool.step({"a": "look"})["a"]
        assert step.is_action_valid
        assert not step.truncated
        assert pool.counters() == {"cache_hits": 0, "cache_misses": 3}
        pool.reset({"a": ResetRequest(game.id)})
        assert pool.counters() == {"cache_hits": 1, "cache_misses": 0}


def test_unknown_game_and_missing_folder_are_told_with_the_path(tmp_path):
    root = games_root("easy")
    with EnvPool(partial(AlfworldEnv, root), workers=1) as pool:
        step = pool.reset({"a": ResetRequest("train/none")})["a"]
        assert re.search(
            r"FileNotFoundError: No game 'train/none': .* is missing", step.infra_error
        )
    with (
        EnvPool(partial(AlfworldEnv, tmp_path), workers=1) as pool,
        pytest.raises(FileNotFoundError, match="No ALFWorld games in"),
    ):
        pool.reset({"a": ResetRequest("train/none")})


def _run(script, **environment):
    done = process("-c", textwrap.dedent(script), env={**COMMAND_ENVIRONMENT, **environment})
    assert done.returncode == 0, done.stderr
    return done


def test_importing_the_room_imports_no_engine_and_using_it_writes_nothing_into_the_home(tmp_path):
    root = games_root("easy")
    script = f"""
        import os, sys
        os.environ.pop("ALFWORLD_DATA", None)
        import aem_lightning.envs.alfworld as room
        heavy = {{"torch", "lightning", "transformers", "numpy", "textworld", "alfworld"}}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
        sys.argv = ["mine"]
        env = room.AlfworldEnv({str(root)!r})
        env.reset(options={{"task_id": {list_games(root, "train")[0].id!r}}})
        env.close()
        assert sys.argv == ["mine"]
        assert "textworld" in sys.modules
        assert "torch" not in sys.modules
        assert "ALFWORLD_DATA" not in os.environ
    """
    _run(script, HOME=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_missing_package_is_told_with_the_extra():
    script = """
        import sys
        sys.modules["alfworld"] = sys.modules["textworld"] = None  # an import now raises
        from aem_lightning.envs.alfworld import AlfworldEnv, vocabulary_texts
        from aem_lightning.envs import MissingExtraError
        import pathlib, tempfile
        root = pathlib.Path(tempfile.mkdtemp())
        (root / "json_2.1.1").mkdir()
        for use in (vocabulary_texts, lambda: AlfworldEnv(root)):
            try:
                use()
            except MissingExtraError as error:
                assert "pip install 'aem-lightning[alfworld]'" in str(error)
            else:
                raise SystemExit("no error")
    """
    _run(script)


def test_another_textworld_is_left_alone_with_a_warning():
    script = """
        import importlib.metadata, logging
        from aem_lightning.envs.alfworld import cache
        cache.version = lambda name: "9.9.9"
        logging.basicConfig()
        import textworld.envs.pddl.textgen as textgen
        before = textgen.copy_context
        assert cache.apply_engine_caches() is False
        assert textgen.copy_context is before
    """
    assert "textworld 9.9.9 is installed" in _run(script).stderr


def test_vocabulary_covers_every_word_of_played_games():
    known = set(re.findall(r"\w+|[^\w\s]", " ".join(vocabulary_texts()).lower()))
    said = []
    for difficulty in ("easy", "medium"):
        root = games_root(difficulty)
        with EnvPool(partial(AlfworldEnv, root), workers=2) as pool:
            for split in ("train", "valid_unseen"):
                games = list_games(root, split)
                actions, answers = _walk(pool, games, "words")
                said += [text for steps in actions.values() for text in steps if "moon" not in text]
                said += [step.observation for steps in answers.values() for step in steps]
                said += [a for s in answers.values() for step in s for a in step.admissible_actions]
    words = set(re.findall(r"\w+|[^\w\s]", " ".join(said).lower())) - {"nowhere"}
    assert len(words) > 60
    assert words <= known, sorted(words - known)
    assert "moon" not in known


def test_trimmed_library_is_a_fraction_of_the_file_and_still_loads(tmp_path):
    interface = pytest.importorskip("fast_downward.interface")
    whole = Path(interface.DOWNWARD_LIB_PATH).read_bytes()
    trimmed = trim(whole)
    assert len(trimmed) <= len(whole)
    (tmp_path / "lib.so").write_bytes(trimmed)
    library = ctypes.CDLL(str(tmp_path / "lib.so"))
    assert library.get_state_size is not None
    assert trim(b"MZ" + bytes(100)) is None
