"""Evaluation over an endpoint on the toy environment: what is kept, what is played again."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_endpoint import Answer, FakeEndpoint, completion, error, serving
from runs import COIN, composed
from tiny_play import LocalPool

from aem_lightning.callbacks.transcripts import episode_record, recorded_episode
from aem_lightning.rollout import EndpointError
from aem_lightning.runner import api_play, evaluate
from aem_lightning.viewer import read_episodes
from aem_lightning.viewer.episodes import prompts

pytest.importorskip("openai", reason="the extra 'api' is not installed")

Run = Callable[..., dict[str, Any]]


class Pool(LocalPool):
    """The environments in this process; ``played`` keeps all tasks that were started."""

    played: Counter[str]

    def __init__(self, make_env: Any, *, workers: int, **settings: Any) -> None:
        super().__init__(make_env)
        assert workers == 1, "a pool is one thread's at a time, so more workers would idle"

    def send(self, requests: Any = None, actions: Any = None) -> None:
        self.played.update(request.task_id for request in (requests or {}).values())
        super().send(requests, actions)

    def release(self, keys: Any) -> None:
        for key in keys:
            self.envs.pop(key, None)

    def close(self) -> None:
        assert not self.envs, "an episode was not released"


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each task was started."""
    Pool.played = Counter()
    monkeypatch.setattr(api_play, "EnvPool", Pool)
    return Pool.played


def finder(body: dict[str, Any]) -> Any:
    """A model that opens a wrong box first, then the one that the hint names."""
    said = body["messages"][-1]["content"]
    box = "red" if "glints" not in said else said.split("near the ")[1].split()[0]
    return f"<think>hm</think><action>open {box} box</action>"


@pytest.fixture
def fake() -> Iterator[FakeEndpoint]:
    with serving(finder) as server:
        yield server


@pytest.fixture
def run(fake: FakeEndpoint, played: Counter[str], tmp_path: Path) -> Run:
    def run(*changes: str) -> dict[str, Any]:
        overrides = (
            "policy=api",
            *COIN[1:],
            f"base_url={fake.url}",
            "model=m",
            "concurrency=2",
            "max_retries=0",
            "max_turns=4",
            f"paths.root_dir={tmp_path}",
            f"paths.output_dir={tmp_path}",
        )
        fake.bodies.clear()
        played.clear()
        report = evaluate(composed([*overrides, *changes], "eval"))
        assert report == json.loads((tmp_path / "evaluation.json").read_text())
        return report

    return run


def records(tmp_path: Path) -> list[dict[str, Any]]:
    return [dict(record) for record in read_episodes(tmp_path / "logs/api")]


def test_a_second_run_plays_what_is_finished_or_a_half_line_stops_it(
    run: Run, played: Counter[str], tmp_path: Path
) -> None:
    first = run("splits=[valid_seen]")
    assert (first["success"]["rate"], first["success"]["episodes"]) == (1.0, 4)
    file = tmp_path / "logs/api/transcripts.jsonl"
    with file.open("a") as half:
        half.write('{"key": "of a run that was kil')
    full = run()
    assert sorted(played) == [f"valid_unseen/{i}" for i in range(4)]
    assert (full["success"]["episodes"], full["complete"]) == (8, True)
    again = run("token_budget=1")
    assert not played
    assert again["tokens"].pop("this_run") == 0
    assert full["tokens"].pop("this_run") == 110 * 4
    assert again == full
    assert len(records(tmp_path)) == 8


def test_an_episode_of_other_settings_is_taken_for_a_finished_one(
    run: Run, played: Counter[str]
) -> None:
    run("splits=[valid_seen]")
    for change in (
        "model=other",
        "prompt=think_action",
        "prompt.system=Hear.",
        "seed=1",
        "temperature=null",
        "max_turns=3",
        "request={top_p: 0.5}",
        "+datamodule.sizes={train: 1, valid_seen: 4, valid_unseen: 4}",
    ):
        run("splits=[valid_seen]", change)
        assert len(played) == 4, change


def test_the_address_and_the_concurrency_make_other_episodes(
    run: Run, played: Counter[str]
) -> None:
    run("splits=[valid_seen]")
    with serving(finder) as other:
        run("splits=[valid_seen]", f"base_url={other.url}", "concurrency=5", "timeout_s=9")
    assert not played


def test_a_budget_ends_with_an_error_or_without_a_report(
    run: Run, played: Counter[str], caplog: pytest.LogCaptureFixture
) -> None:
    half = run("token_budget=330", "concurrency=1")
    assert (half["complete"], half["missing"], half["success"]["episodes"]) == (False, 5, 3)
    assert len(half["success"]["by_type"]) > 1, "a budget plays one type of tasks"
    assert half["tokens"]["this_run"] == 330
    assert sum(played.values()) == 3, "a game is started that cannot be played"
    assert "token_budget=330 ended 5 of them" in caplog.text
    assert "the rate is too high until all are played" in caplog.text
    assert run()["complete"]
    assert sum(played.values()) == 5


def test_requests_wait_for_each_other_or_are_more_than_allowed(
    run: Run, fake: FakeEndpoint
) -> None:
    meeting = threading.Barrier(2, timeout=30)

    def sociable(body: dict[str, Any]) -> Any:
        if len(fake.bodies) <= 2:
            meeting.wait()
        return finder(body)

    fake.think = sociable
    assert run("concurrency=2")["success"]["rate"] == 1.0
    assert fake.most_at_once == 2


def test_a_budget_for_no_episode_is_not_explained(run: Run, fake: FakeEndpoint) -> None:
    fake.think = lambda body: "no idea"
    with pytest.raises(EndpointError, match=r"token_budget=1 was spent .* type a larger"):
        run("token_budget=1", "concurrency=1")


def test_one_broken_episode_breaks_the_others_or_is_not_played_again(
    run: Run, fake: FakeEndpoint, played: Counter[str], caplog: pytest.LogCaptureFixture
) -> None:
    fake.think = lambda b: error(500, "I cannot") if "the blue box" in str(b) else finder(b)
    report = run()
    assert (report["success"]["episodes"], report["success"]["infra_errors"]) == (6, 2)
    assert (report["complete"], report["missing"]) == (False, 2)
    assert "2 broke, the last: Error code: 500" in caplog.text
    fake.think = finder
    assert run()["complete"]
    assert sum(played.values()) == 2


def test_episodes_that_all_break_give_a_rate(run: Run, fake: FakeEndpoint) -> None:
    fake.think = lambda body: error(400, "Unsupported parameter")
    with pytest.raises(EndpointError, match=r"All 4 episodes broke.*Unsupported parameter"):
        run("splits=[valid_seen]")


def test_what_was_finished_before_the_endpoint_broke_is_lost(
    run: Run, fake: FakeEndpoint, tmp_path: Path
) -> None:
    fake.think = lambda b: finder(b) if len(fake.bodies) < 4 else error(401, "no more")
    with pytest.raises(EndpointError, match="3 finished episodes are kept in"):
        run("concurrency=1")
    assert len(records(tmp_path)) == 3


def test_a_full_context_is_no_lost_episode(run: Run, fake: FakeEndpoint, tmp_path: Path) -> None:
    def forgetful(body: dict[str, Any]) -> Any:
        if len(body["messages"]) > 3:
            return error(400, "too long", "context_length_exceeded")
        return "<think>hm</think><action>look</action>"

    fake.think = forgetful
    report = run("memory=transcript", "splits=[valid_seen]")
    assert (report["success"]["rate"], report["complete"]) == (0.0, True)
    assert [(len(r["turns"]), r["truncated"]) for r in records(tmp_path)] == [(2, True)] * 4


def test_a_transcript_is_not_the_conversation(run: Run, fake: FakeEndpoint) -> None:
    fake.think = lambda body: "" if len(body["messages"]) == 2 else "Thought: a\nAction: look"
    run("prompt=react", "memory=transcript", "splits=[valid_seen]", "prompt.system=Hear.")
    longest = max((body["messages"] for body in fake.bodies), key=len)
    assert [m["role"] for m in longest] == ["system", *["user", "assistant"] * 3, "user"]
    assert longest[0]["content"] == "Hear."
    assert "A coin glints" in longest[1]["content"]
    assert longest[2]["content"] == "...", "some endpoints refuse an empty message"
    assert longest[4]["content"] == "Thought: a\nAction: look"
    assert longest[5]["content"].startswith("Observation: Nothing happens .")


def test_a_call_is_lost_or_answered_by_the_user(run: Run, fake: FakeEndpoint) -> None:
    def caller(body: dict[str, Any]) -> Any:
        if len(body["messages"]) == 1:
            return "I do not know."
        act = {"name": "act", "arguments": '{"action": "open red box"}'}
        call = {"id": "c1", "type": "function", "function": act}
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
        return Answer(completion(None, message=message))

    fake.think = caller
    report = run("prompt=tool_call", "memory=transcript", "splits=[valid_seen]")
    assert report["malformed"] == {"no call": 4}
    assert report["handled"] == {}, "a call is what is asked for"
    assert {body["tools"][0]["function"]["name"] for body in fake.bodies} == {"act"}
    longest = max((body["messages"] for body in fake.bodies), key=len)
    roles = ["user", "assistant", "user", *["assistant", "tool"] * 2]
    assert [message["role"] for message in longest] == roles
    assert longest[-1]["tool_call_id"] == longest[-2]["tool_calls"][0]["id"] == "c1"


def test_a_window_is_more_than_one_message(run: Run, fake: FakeEndpoint) -> None:
    fake.think = lambda body: "Thought: hm\nAction: look"
    report = run("prompt=react", "splits=[valid_seen]")
    assert report["success"]["rate"] == 0.0
    assert {tuple(m["role"] for m in body["messages"]) for body in fake.bodies} == {("user",)}
    texts = [body["messages"][0]["content"] for body in fake.bodies]
    # Two past turns at most, with the thoughts that were written in them.
    assert Counter(text.count("Thought: hm") for text in texts) == {0: 4, 1: 4, 2: 8}


def test_episodes_come_back_from_the_file_as_they_were(run: Run, tmp_path: Path) -> None:
    run("splits=[valid_seen]")
    for record in records(tmp_path):
        again = episode_record(recorded_episode(record))
        assert again == {name: record[name] for name in again}
        assert record["turns"][0]["tokens"] == 10


def test_what_was_handled_is_lost_between_runs_or_ends_the_evaluation(
    run: Run, fake: FakeEndpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    refused: list[str] = []

    def moody(body: dict[str, Any]) -> Any:
        said = str(body["messages"])
        if "the red box" in said:
            return error(429, "slow down")
        if "the green box" in said:
            return Answer(completion("half"), cut=True)
        if "the blue box" in said and not refused:
            refused.append(said)
            return Answer(completion(None, finish_reason="content_filter"))
        return finder(body)

    fake.think = moody
    report = run("splits=[valid_seen]", "concurrency=1", "max_turns=2")
    assert report["success"]["infra_errors"] == 2
    assert report["handled"] == {"rate_limited": 1, "dropped": 1, "refusal": 1}
    assert "rate limited" in capsys.readouterr().out
    fake.think = finder
    again = run("splits=[valid_seen]", "concurrency=1", "max_turns=2")
    assert again["complete"]
    assert again["handled"] == {"refusal": 1}, "kept with the episodes"


def test_a_game_whose_first_prompt_never_fits_counts_as_a_lost_one(
    run: Run, fake: FakeEndpoint
) -> None:
    full = error(400, "maximum context length is 10 tokens")
    fake.think = lambda body: full if "the red box" in str(body) else finder(body)
    report = run("splits=[valid_seen]")
    assert report["success"]["infra_errors"] == 1
    assert report["handled"] == {"context_full": 1}


def test_reasoning_that_an_endpoint_hands_over_by_itself_makes_replies_malformed(
    run: Run, fake: FakeEndpoint, tmp_path: Path
) -> None:
    def thinks(body: dict[str, Any]) -> Any:
        action = finder(body).partition("</think>")[2]
        answer = json.loads(completion(action))
        answer["choices"][0]["message"]["reasoning_content"] = "the box glints"
        return Answer(json.dumps(answer))

    fake.think = thinks
    report = run("splits=[valid_seen]")
    assert report["success"]["rate"] == 1.0
    assert not any(episode["malformed"] for episode in report["episodes"])
    said = records(tmp_path)[0]["turns"][0]["response"]
    assert said.startswith("<think>the box glints</think><action>")


def test_repeats_play_finished_games_again_or_are_one_more_game(
    run: Run, fake: FakeEndpoint, played: Counter[str], tmp_path: Path
) -> None:
    run("splits=[valid_seen]")
    boxes: dict[str, int] = {}

    def sometimes(body: dict[str, Any]) -> Any:
        """The hint is followed from the second repeat of each game on."""
        said = body["messages"][-1]["content"]
        if "glints" not in said:
            return finder(body)
        box = said.split("near the ")[1].split()[0]
        boxes[box] = boxes.get(box, 0) + 1
        return finder(body) if boxes[box] > 1 else "<action>"

    fake.think = sometimes
    report = run("splits=[valid_seen]", "repeats=3", "max_turns=1")
    assert Counter(played.values()) == {3: 4}, "other limits make other episodes"
    result = report["success"]
    assert (result["rate"], result["games"], result["episodes"]) == (pytest.approx(2 / 3), 4, 12)
    assert result["pass_at_k"] == {"1": pytest.approx(2 / 3), "2": 1.0, "3": 1.0}
    assert result["pass_hat_k"] == {"1": pytest.approx(2 / 3), "2": pytest.approx(1 / 3), "3": 0.0}
    more = run("splits=[valid_seen]", "repeats=4", "max_turns=1")
    assert sorted(played.items()) == [(f"valid_seen/{i}", 1) for i in range(4)]
    assert (more["success"]["rate"], more["complete"]) == (0.75, True)
    fake.think = lambda b: error(500, "no") if "the blue box" in str(b) else finder(b)
    broken = run("splits=[valid_seen]", "repeats=2", "max_turns=2", "seed=1")["success"]
    assert (broken["games"], broken["episodes"], broken["infra_errors"]) == (3, 6, 2)
    with pytest.raises(ValueError, match=r"request.seed=1 repeats=2: every repeat would be drawn"):
        run("repeats=2", "request={seed: 1}")


def test_a_transcript_of_messages_is_not_what_was_sent(
    run: Run, fake: FakeEndpoint, tmp_path: Path
) -> None:
    fake.think = lambda body: "Thought: hm\nAction: look"
    for memory in ("transcript", "window"):
        run("splits=[valid_seen]", "prompt=react", f"memory={memory}", "concurrency=1")
        sent = [body["messages"] for body in fake.bodies]
        kept = [prompt for record in records(tmp_path)[-4:] for prompt in prompts(record)]
        assert [prompt and prompt["messages"] for prompt in kept] == sent
    new = records(tmp_path)[0]["turns"][-1]["prompt"]["messages"]["new"]
    assert [message["role"] for message in new] == ["assistant", "user"]
