"""Environments of other libraries. What is not installed is played by a stand-in or skipped."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from coin import ACTIONS, CoinEnv
from gym_words import MOVES, WORDS, FakeGame
from runs import COIN, composed

from aem_lightning.datamodules import GymnasiumDataModule, SeededDataModule
from aem_lightning.envs import MissingExtraError, TextEnv, check_env
from aem_lightning.envs.adapters import (
    GymnasiumEnv,
    OpenEnvEnv,
    ReasoningGymEnv,
    TextArenaEnv,
)
from aem_lightning.envs.answers import RESET, STEP, BadAnswerError, checked_answer
from aem_lightning.envs.questions import task_number
from aem_lightning.envs.verifiers_env import VerifiersEnv
from aem_lightning.runner.build import build_datamodule, instantiate
from aem_lightning.runner.serve import served

SMALL = ("datamodule.sizes={train: 4, valid: 3}", "datamodule.workers=1")


def start(env: TextEnv, number: int) -> str:
    return env.reset(seed=9, options={"task_id": f"train/{number}"})[0]


# ---------------------------------------------------------------------------------------- Gymnasium


@pytest.fixture
def words():
    """A word environment of real Gymnasium; the package is a part of the project's own install."""
    pytest.importorskip("gymnasium")
    return "gym_words:Words-v0"


def test_a_gymnasium_id_keeps_the_contract_through_its_config(words):
    named = "datamodule.action_names=[first,second,third]"
    cfg = composed(["datamodule=gymnasium", f"datamodule.env_id='{words}'", named, *SMALL])
    datamodule = build_datamodule(cfg)
    assert isinstance(datamodule, GymnasiumDataModule)
    assert {task.type for task in datamodule.tasks("valid")} == {"Words-v0"}
    check_env(datamodule, prompt=instantiate(composed(["prompt=think_action"]).prompt))


def test_a_named_action_is_the_move_of_its_number_and_wins(words):
    env = GymnasiumEnv(words, action_names=MOVES)
    text = start(env, 3)
    sought, shown = text[5:].split(": ")
    move = MOVES[shown.split(",")[0].split().index(sought)]
    _, reward, terminated, truncated, info = env.step(move)
    assert (reward, terminated, truncated, info["won"]) == (1.0, True, False, True)
    assert set(info) <= {"task_id", "admissible_actions", "is_action_valid", "won"}


def test_an_action_without_a_name_changes_nothing(words):
    env = GymnasiumEnv(words, action_names=MOVES)
    text = start(env, 3)
    seen, reward, terminated, _, info = env.step("fourth")
    assert (seen, reward, terminated, info["is_action_valid"]) == (text, 0.0, False, False)


def test_text_actions_go_through_as_they_are(words):
    env = GymnasiumEnv(words, text_actions=True)
    sought = start(env, 1)[5:].split(":")[0]
    assert env.step(sought)[-1]["won"]


def test_gymnasium_environments_that_are_not_text_say_what_to_type(words):
    with pytest.raises(ValueError, match=r"has 3 actions .* datamodule.action_names=\["):
        GymnasiumEnv(words)
    with pytest.raises(TypeError, match=r"which is no text: give datamodule\.describe"):
        start(GymnasiumEnv(words, action_names=MOVES, numbers=True), 0)
    described = GymnasiumEnv(words, action_names=MOVES, numbers=True, describe=str)
    assert start(described, 0).isdecimal()
    with pytest.raises(ValueError, match=r"acts by Box.*allowed: Text, or Discrete"):
        GymnasiumEnv("Pendulum-v1")


# ---------------------------------------------------------------------------------------- TextArena


def test_textarena_keeps_the_contract_through_its_config():
    pytest.importorskip("textarena")
    check_env(build_datamodule(composed(["datamodule=textarena", *SMALL])))


def test_textarena_tells_an_invalid_move_from_a_loss():
    pytest.importorskip("textarena")
    env = TextArenaEnv("GuessTheNumber-v0")
    start(env, 1)
    assert env.step("I do not know")[-1]["is_action_valid"] is False
    for number in range(1, 21):
        *_, terminated, _, info = env.step(f"[{number}]")
        assert info["is_action_valid"]
        if terminated:
            break
    assert terminated


def test_games_that_are_played_in_turn_do_not_share_their_luck(monkeypatch):
    game = ModuleType("textarena")
    game.make = lambda env_id: FakeGame()
    monkeypatch.setitem(sys.modules, "textarena", game)

    def episode(env):
        seen = [start(env, 5)]
        while True:
            yield seen
            text, *_, terminated, _, _ = env.step(WORDS[0])
            seen.append(text)
            if terminated:
                return

    alone = list(episode(TextArenaEnv("any")))[-1]
    random.seed(0)
    expected = random.random()
    random.seed(0)
    both = list(zip(episode(TextArenaEnv("any")), episode(TextArenaEnv("any")), strict=True))
    assert both[-1] == (alone, alone)
    assert random.random() == expected


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        ("Use `[i j op]`.", r"reward='Use `\[i j op\]`\.'; expected a number"),
        (None, "reward=None; expected a number"),
        (float("nan"), "reward=nan; expected a finite number"),
    ],
)
def test_a_game_that_answers_no_number_for_a_reward_is_refused_in_words(reward, told, monkeypatch):
    class Talks(FakeGame):
        def close(self):
            return {0: reward}, {0: {}}

    monkeypatch.setitem(sys.modules, "textarena", fake_textarena(Talks))
    env = TextArenaEnv("talks")
    start(env, 1)
    answer = [env.step(WORDS[0]) for _ in range(3)][-1]
    with pytest.raises(BadAnswerError, match=told):
        checked_answer(answer, STEP)
    assert answer[-1]["won"] is False
    if reward != reward:  # a number, which `info` would have too
        return
    assert checked_answer(answer, STEP, uses_reward=False).reward == 0.0


def fake_textarena(game, **more):
    library = ModuleType("textarena")
    library.make = lambda env_id: game()
    vars(library).update(more)
    return library


@pytest.mark.parametrize("notices", [True, False])
def test_a_game_for_several_players_is_refused_where_it_is_made(notices, monkeypatch):
    class Duel(FakeGame):
        def reset(self, num_players, seed=None):
            assert num_players == 2 or not notices, f"2 players, received {num_players}"

    alone = type("SinglePlayerState", (), {})
    monkeypatch.setitem(sys.modules, "textarena", fake_textarena(Duel, SinglePlayerState=alone))
    with pytest.raises(ValueError, match=r"env_id='duel' .* for several players.*=GuessTheNumber"):
        TextArenaEnv("duel")


def test_a_game_that_does_not_start_says_why_where_it_is_made(monkeypatch):
    class Locked(FakeGame):
        def reset(self, num_players, seed=None):
            raise LookupError("no word list; fetch it")

    monkeypatch.setitem(sys.modules, "textarena", fake_textarena(Locked))
    with pytest.raises(ValueError, match="LookupError: no word list; fetch it"):
        TextArenaEnv("locked")


# ------------------------------------------------------------------------------------ reasoning-gym


def test_reasoning_gym_keeps_the_contract_through_its_config():
    pytest.importorskip("reasoning_gym")
    check_env(build_datamodule(composed(["datamodule=reasoning_gym", *SMALL])))


def test_an_answer_is_scored_and_ends_the_episode(monkeypatch):
    class Sums:
        def __getitem__(self, number):
            return {"question": f"1 + {number} =", "answer": str(1 + number)}

        def score_answer(self, answer, entry):
            return 1.0 if answer == entry["answer"] else 0.25

    library = ModuleType("reasoning_gym")
    library.create_dataset = lambda name, seed, size: Sums()
    monkeypatch.setitem(sys.modules, "reasoning_gym", library)
    env = ReasoningGymEnv("sums")
    assert start(env, 6) == "1 + 6 ="
    assert env.step("7")[1:4] == (1.0, True, False)
    start(env, 6)
    assert env.step("8")[-1] == {"task_id": "train/6", "won": False, "score": 0.25}


def test_a_checker_that_raises_and_one_without_a_score_are_told_in_words(monkeypatch):
    class Strict:
        def __getitem__(self, number):
            return {"question": None if number == 9 else "Factors of 6?", "answer": None}

        def score_answer(self, answer, entry):
            return None if answer == "" else float(int(answer) == 6)

    library = ModuleType("reasoning_gym")
    library.create_dataset = lambda name, seed, size: Strict()
    monkeypatch.setitem(sys.modules, "reasoning_gym", library)
    env = ReasoningGymEnv("strict")
    start(env, 1)
    with pytest.raises(
        BadAnswerError, match=r"checker of strict raised ValueError: .*answer 'six'"
    ):
        env.step("six")
    assert checked_answer(env.step("6"), STEP).info["won"]
    with pytest.raises(BadAnswerError, match="reward=None; expected a number"):
        checked_answer(env.step(""), STEP)
    with pytest.raises(BadAnswerError, match="observation=None; expected str"):
        checked_answer(env.reset(options={"task_id": "train/9"}), RESET)


# ------------------------------------------------------------------------------------------ OpenEnv


@dataclass
class FakeClient:
    """What the adapter uses of a client of version 0.2.1; newer ones hand one out by `sync`."""

    base_url: str
    sent: list[Any] = field(default_factory=list)

    def reset(self, **options):
        self.sent.append(options)
        return SimpleNamespace(observation={"text": "Say it."}, reward=None, done=False)

    def step(self, action):
        self.sent.append(action)
        done = action == {"message": "it"}
        return SimpleNamespace(observation={"text": "So."}, reward=float(done), done=done)

    def close(self):
        self.sent.append("closed")


class AsyncClient(FakeClient):
    def sync(self):
        return FakeClient(self.base_url, self.sent)

    async def reset(self, **options):
        raise AssertionError("nobody awaits")


@pytest.mark.parametrize("kind", [FakeClient, AsyncClient])
def test_an_openenv_client_is_played_by_its_fields(kind):
    clients = []

    def make(url):
        clients.append(kind(url))
        return clients[-1]

    env = OpenEnvEnv("http://host:1", make_client=make)
    assert start(env, 4) == "Say it."
    assert env.step("that") == ("So.", 0.0, False, False, {"task_id": "train/4", "won": False})
    assert env.step("it") == ("So.", 1.0, True, False, {"task_id": "train/4", "won": True})
    env.close()
    assert clients[0].sent == [{"seed": 4}, {"message": "that"}, {"message": "it"}, "closed"]


def test_a_field_that_the_server_does_not_send_is_answered_with_those_that_it_does():
    env = OpenEnvEnv("http://host:1", observation_field="output", make_client=FakeClient)
    with pytest.raises(ValueError, match=r"observation_field=<one of text>"):
        start(env, 0)


def openenv_app():
    """A real OpenEnv server's application: three words, one of them sought."""
    from openenv.core.env_server import Action, Environment, Observation, create_fastapi_app
    from openenv.core.env_server.types import State

    class Say(Action):
        message: str

    class Told(Observation):
        text: str

    class Words(Environment):
        SUPPORTS_CONCURRENT_SESSIONS = True

        def reset(self, seed=None, episode_id=None, **options):
            self._word = random.Random(seed).choice(WORDS)
            return Told(text=f"Say {self._word}, number {seed}.")

        def step(self, action, timeout_s=None, **options):
            won = action.message == self._word
            return Told(text="So.", reward=float(won), done=won)

        @property
        def state(self):
            return State()

    return create_fastapi_app(Words, Say, Told, max_concurrent_envs=8)


@contextlib.contextmanager
def listening(app):
    """The address of a server that runs ``app``."""
    uvicorn = pytest.importorskip("uvicorn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def openenv_url():
    pytest.importorskip("openenv")
    with listening(openenv_app()) as url:
        yield url


def test_an_openenv_server_keeps_the_contract_through_its_config(openenv_url):
    url = f"datamodule.env.base_url='{openenv_url}'"
    datamodule = build_datamodule(composed(["datamodule=openenv", url, *SMALL]))
    check_env(datamodule)
    env = datamodule.env_factory()()
    word = start(env, 2).split()[1].rstrip(",")
    assert env.step(word)[-1]["won"]
    env.close()


def test_an_environment_of_ours_is_the_same_over_an_openenv_server(tmp_path):
    pytest.importorskip("openenv")
    words = [*COIN, f"paths.root_dir={tmp_path}"]
    with listening(served(words, "valid_seen")) as url:
        far, near = OpenEnvEnv(url), CoinEnv()
        for number in range(2):
            asked = {"options": {"task_id": f"train/{number}"}}
            seen, info = near.reset(options={"task_id": f"valid_seen/{number}"})
            assert far.reset(**asked) == (seen, info | asked["options"])
            for action in ("no action", *ACTIONS):
                *step, info = near.step(action)
                assert far.step(action) == (*step, info | asked["options"])
                if step[2]:
                    break
        far.close()


# ---------------------------------------------------------------------------------------- verifiers


def test_an_environment_of_verifiers_keeps_the_contract_through_its_config():
    pytest.importorskip("verifiers")
    words = ["datamodule=verifiers", "datamodule.env.env_id=vf-words", *SMALL]
    check_env(build_datamodule(composed([*words, "+datamodule.env.held_out=true"])))


def test_the_rubric_of_verifiers_gives_the_reward_when_the_rollout_ends():
    pytest.importorskip("verifiers")
    env = VerifiersEnv("vf-words", kind="several", held_out=True)
    answer = WORDS[(4 + 1) % 3]
    assert start(env, 4) == f"Find the word.\n\nNumber 4: not {WORDS[4 % 3]}."
    text, reward, ended, _, info = env.step("no such word")
    assert (text, reward, ended, info) == ("Not that.", 0.0, False, {"task_id": "train/4"})
    _, reward, ended, _, info = env.step(answer)
    assert (reward, ended, info["won"], info["score"]) == (1 + 0.5 / 3, True, True, reward)
    start(env, 5)  # in the middle of which another begins
    assert "Number 102" in env.reset(options={"task_id": "valid/8"})[0]
    turns = [env.step("no such word") for _ in range(3)]
    assert [turn[2] for turn in turns] == [False, False, True]  # its own limit
    assert (turns[-1][1], turns[-1][-1]["won"]) == (0.5 / 5, False)
    env.close()
    single = VerifiersEnv("vf-words", kind="one", win_at=1.5)
    start(single, 4)
    assert single.step(answer)[1:3] == (1.5, True)
    single.close()


def test_rows_and_environments_that_verifiers_has_not_are_told():
    pytest.importorskip("verifiers")
    env = VerifiersEnv("vf-words")
    with pytest.raises(ValueError, match=r"has 9 rows. Type .*sizes\.train=8 .*sizes\.valid=1"):
        start(env, 9)
    env.close()
    with pytest.raises(ValueError, match=r"env_id='vf-wrds'.*install it, e\.g\. pip install"):
        VerifiersEnv("vf-wrds")


def bare_verifiers(rollout=None):
    """Without the library: an evaluation set of three rows."""
    env = VerifiersEnv.__new__(VerifiersEnv)
    env._env = SimpleNamespace(
        eval_dataset=True, get_eval_dataset=lambda: [{"n": n} for n in range(3)], rollout=rollout
    )
    env._id, env._taken, env._rollout, env._client = "few", {}, None, None
    env._loop = asyncio.new_event_loop()
    return env


def test_a_row_of_verifiers_is_evaluated_twice_under_two_tasks():
    env = bare_verifiers()
    assert [env._row(f"valid/{n}", n)["n"] for n in (4, 5, 6, 4)] == [1, 2, 0, 1]
    assert env._row("test/7", 7) == {"n": 1}
    with pytest.raises(ValueError, match=r"few has 3 rows, .* Type datamodule\.sizes\.valid=3"):
        env._row("valid/7", 7)
    env.close()


def test_a_rollout_of_verifiers_that_ends_in_its_set_up_is_played():
    async def rollout(*_):
        return {"error": "no sandbox"}

    env = bare_verifiers(rollout)
    with pytest.raises(RuntimeError, match=r"few ended before it asked the policy.*: no sandbox"):
        env.reset(options={"task_id": "valid/4"})
    env.close()


# ---------------------------------------------------------------------------------- what they share


def test_no_number_is_a_task_of_two_splits():
    data = SeededDataModule(FakeGame, sizes={"train": 3, "valid": 2, "test": 2})
    assert [task.id for task in data.tasks("valid")] == ["valid/0000003", "valid/0000004"]
    numbers = [task.id[-7:] for split in ("train", "valid", "test") for task in data.tasks(split)]
    assert numbers == sorted(set(numbers))
    assert data.evaluation_splits == ("valid", "test")


def test_a_split_without_a_size_is_refused():
    with pytest.raises(ValueError, match=r"has no tasks for 'test': type datamodule\.sizes\.test"):
        SeededDataModule(FakeGame, sizes={"train": 3}, evaluation_splits=["test"])


def test_a_task_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="task_id='train/x': a number behind a split"):
        task_number({"task_id": "train/x"})


@pytest.mark.parametrize(
    ("make", "extra"),
    [
        (lambda: GymnasiumEnv("any"), "gymnasium"),
        (lambda: TextArenaEnv("any"), "adapters"),
        (lambda: ReasoningGymEnv("any"), "adapters"),
        (lambda: OpenEnvEnv("http://host:1"), "adapters"),
        (lambda: VerifiersEnv("any"), "adapters"),
    ],
)
def test_a_library_that_is_missing_is_named_with_its_extra(make, extra, monkeypatch):
    for name in ("gymnasium", "textarena", "reasoning_gym", "openenv", "openenv.core", "verifiers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'aem-lightning\[{extra}\]'"):
        make()
