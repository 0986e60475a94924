"""``eval.py policy=api`` on generated ALFWorld games, against an endpoint made for the test."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Command, Ended
from fake_endpoint import FakeEndpoint, error, serving

from aem_lightning.envs.alfworld import AlfworldEnv, list_games

pytest.importorskip("openai", reason="the extra 'api' is not installed")

SECRET = "sk-very-secret"


@pytest.fixture(scope="module")
def walkthroughs(alfworld_root: Path) -> dict[str, tuple[str, ...]]:
    """What wins each evaluation game, by the first thing that the game says."""
    env = AlfworldEnv(str(alfworld_root))
    splits = ("valid_seen", "valid_unseen")
    games = [game for split in splits for game in list_games(alfworld_root, split)]
    found = {env.reset(options={"task_id": game.id})[0]: game.walkthrough for game in games}
    env.close()
    assert len(found) == len(games)
    return found


@pytest.fixture
def fake(walkthroughs: dict[str, tuple[str, ...]]) -> Iterator[FakeEndpoint]:
    """A model that knows every game, and finds its place in it from the conversation."""

    def think(body: dict[str, Any]) -> str:
        opening = body["messages"][0]["content"]
        actions = next(actions for first, actions in walkthroughs.items() if first in opening)
        form = "Thought: so\nAction: {}\nObservation: you win\nAction: look"
        if "<action>" in opening:
            form = "<think>so</think><action>{}</action>"
        return form.format(actions[sum(m["role"] == "assistant" for m in body["messages"])])

    with serving(think) as server:
        yield server


@pytest.fixture
def evaluate(
    fake: FakeEndpoint,
    alfworld_root: Path,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> Command:
    monkeypatch.setenv("ALFWORLD_DATA", str(alfworld_root))
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    given = {
        "policy": "api",
        "datamodule": "alfworld",
        "base_url": fake.url,
        "model": "some/model",
        "memory": "transcript",
        "datamodule.workers": "1",
        "max_turns": "30",
        "concurrency": "3",
        "max_retries": "1",
        "paths.root_dir": str(tmp_path),
    }

    def run(**changes: str) -> Ended:
        words = [f"{name}={value}" for name, value in {**given, **changes}.items() if value]
        return command("eval.py", *words)

    return run


def test_a_prompted_model_does_not_play_every_game_once(
    evaluate: Command, fake: FakeEndpoint, tmp_path: Path, walkthroughs: dict[str, tuple[str, ...]]
) -> None:
    ended = evaluate()
    assert ended.status == 0, ended.said
    assert "success rate, Wilson 95 % interval" in ended.said
    (path,) = tmp_path.glob("logs/api/*/evaluation.json")
    report = json.loads(path.read_text())
    assert (report["model"], report["complete"], report["missing"]) == ("some/model", True, 0)
    assert report["success"]["rate"] == 1.0
    assert report["success"]["episodes"] == 6
    assert 0 < report["success"]["low"] < report["success"]["high"] == 1.0
    assert sum(part["episodes"] for part in report["success"]["by_type"].values()) == 6
    assert {name: part["episodes"] for name, part in report["by_split"].items()} == {
        "valid_seen": 3,
        "valid_unseen": 3,
    }
    assert report["games"].keys() == {"train", "valid_seen", "valid_unseen"}
    turns = sum(map(len, walkthroughs.values()))
    assert sum(episode["turns"] for episode in report["episodes"]) == turns == len(fake.bodies)
    spent = {"prompt": 100 * turns, "completion": 10 * turns, "this_run": 110 * turns}
    assert report["tokens"] == spent
    assert fake.most_at_once <= 3
    assert "python -m aem_lightning.viewer" in ended.said
    lines = (tmp_path / "logs/api/transcripts.jsonl").read_text().splitlines()
    assert len(lines) == 6
    assert json.loads(lines[0])["turns"][0]["response"].startswith("<think>so</think><action>")
    assert set(fake.keys) == {f"Bearer {SECRET}"}
    assert_not_written(SECRET, ended, tmp_path)


def test_react_wins_no_game(evaluate: Command, fake: FakeEndpoint, tmp_path: Path) -> None:
    ended = evaluate(prompt="react", splits="[valid_unseen]")
    assert ended.status == 0, ended.said
    (path,) = tmp_path.glob("logs/api/*/evaluation.json")
    report = json.loads(path.read_text())
    assert (report["success"]["rate"], report["success"]["episodes"]) == (1.0, 3)
    assert not any(episode["malformed"] for episode in report["episodes"])


def assert_not_written(secret: str, ended: Ended, folder: Path) -> None:
    assert secret not in ended.said
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert written
    assert not [path for path in written if secret.encode() in path.read_bytes()]


def test_a_wrong_key_is_not_explained_or_written_down(
    evaluate: Command, fake: FakeEndpoint, tmp_path: Path
) -> None:
    fake.think = lambda body: error(401, f"Incorrect API key: {SECRET}")
    ended = evaluate()
    ended.assert_clear("401", "api_key_env=OPENAI_API_KEY", "0 finished episodes are kept in")
    assert list(tmp_path.glob("logs/api/*/error.log"))
    assert_not_written(SECRET, ended, tmp_path)


def test_bad_options_are_not_explained(evaluate: Command) -> None:
    evaluate(model="").assert_clear("model=null: type model=")
    evaluate(concurrency="0", memory="foo", temperature="-1").assert_clear(
        "concurrency=0: a whole number of at least 1",
        "memory=window, memory=transcript",
        "temperature=-1",
    )
    evaluate(prompt="foo").assert_clear("prompt=foo: there is no such option", "react")
    evaluate(modle="x").assert_clear("modle=x", "Did you mean model")


def test_an_address_where_nobody_is_is_not_explained(evaluate: Command) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
    evaluate(base_url=url).assert_clear(f"Nothing answers at base_url={url}", "Type base_url=")


def test_an_evaluation_of_something_else_is_not_explained(tmp_path: Path, command: Command) -> None:
    place = f"paths.root_dir={tmp_path}"
    for script, word, *said in (
        ("train.py", "policy=api", "not trained", "python eval.py policy=api"),
        ("eval.py", "policy=tiny", "plays the policy of its checkpoint", "policy=api"),
        ("eval.py", "model=x", "model=x: an option of policy=api", "overrides=[model="),
    ):
        command(script, place, word).assert_clear(*said)
