"""The endpoint's client against a server with bad manners."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from fake_endpoint import Answer, FakeEndpoint, completion, error, serving

from aem_lightning.rollout import (
    ContextFullError,
    Endpoint,
    EndpointError,
    RequestError,
    StoppedError,
)
from aem_lightning.rollout.endpoint import GIVE_UP_AFTER, read_reply

pytest.importorskip("openai", reason="the extra 'api' is not installed")

HELLO = [{"role": "user", "content": "hello"}]
SECRET = "sk-very-secret"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEndpoint]:
    monkeypatch.setenv("SOME_KEY", SECRET)
    with serving(lambda body: "hi") as server:
        yield server


def endpoint(fake: FakeEndpoint, **changes: Any) -> Endpoint:
    settings = {"api_key_env": "SOME_KEY", "timeout_s": 5.0, "max_retries": 2}
    return Endpoint("some/model", fake.url, **{**settings, **changes})


def say(client: Endpoint, **changes: Any) -> Any:
    return client.reply(HELLO, **{"max_new_tokens": 7, "temperature": 0.5, **changes})


def replies(*answers: Answer | str) -> Any:
    """A server that gives ``answers`` in turn, the last one for ever."""
    left = list(answers)
    return lambda body: left.pop(0) if len(left) > 1 else left[0]


def test_a_request_is_the_conversation_with_its_limits_and_the_key(fake: FakeEndpoint) -> None:
    reply = say(endpoint(fake))
    assert (reply.text, reply.finish_reason) == ("hi", "stop")
    assert (reply.prompt_tokens, reply.completion_tokens, reply.tokens) == (100, 10, 110)
    (body,) = fake.bodies
    assert body == {
        "model": "some/model",
        "messages": HELLO,
        "max_tokens": 7,
        "temperature": 0.5,
    }
    assert fake.keys == [f"Bearer {SECRET}"]


def test_fields_can_be_added_to_a_request_and_taken_away(fake: FakeEndpoint) -> None:
    own = {"max_tokens": None, "max_completion_tokens": 9, "reasoning_effort": "low"}
    say(endpoint(fake, request=own), temperature=None)
    (body,) = fake.bodies
    assert body.keys() == {"model", "messages", "max_completion_tokens", "reasoning_effort"}


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_what_may_yet_succeed_is_tried_again(fake: FakeEndpoint, status: int) -> None:
    fake.think = replies(error(status, "not now"), error(status, "not now"), "hi")
    assert say(endpoint(fake)).text == "hi"
    assert len({json.dumps(body) for body in fake.bodies}) == 1
    assert len(fake.bodies) == 3


def test_a_reply_that_comes_too_late_is_asked_for_again(fake: FakeEndpoint) -> None:
    fake.think = replies(Answer(completion("late"), delay_s=3.0), "in time")
    assert say(endpoint(fake, timeout_s=1.0)).text == "in time"


def test_replies_that_never_come_break_one_episode(fake: FakeEndpoint) -> None:
    fake.think = lambda body: Answer(completion("late"), delay_s=0.6)
    with pytest.raises(RequestError, match=r"no reply within 0.2 s, after 1 attempts; type"):
        say(endpoint(fake, timeout_s=0.2, max_retries=0))


@pytest.mark.parametrize(
    "body",
    [
        "<html>gateway</html>",
        '{"choices": ',
        '{"choices": []}',
        '{"choices": [{}]}',
        "[]",
        "null",
        '{"choices": [{"message": {"content": 5}}]}',
    ],
)
def test_an_answer_that_is_no_completion_is_asked_for_again(fake: FakeEndpoint, body: str) -> None:
    kind = {"Content-Type": "text/html"} if body.startswith("<") else {}
    fake.think = replies(Answer(body, headers=kind), "hi")
    client = endpoint(fake)
    assert say(client).text == "hi"
    fake.think = replies(Answer(body, headers=kind))
    with pytest.raises(RequestError, match="3 answers were no chat completions"):
        say(client)


def test_a_refusal_is_an_empty_reply_and_a_cut_one_is_marked(fake: FakeEndpoint) -> None:
    fake.think = replies(Answer(completion(None, finish_reason="length")))
    reply = say(endpoint(fake))
    assert (reply.text, reply.finish_reason) == ("", "length")


def test_tokens_are_estimated_where_the_endpoint_does_not_count_them() -> None:
    reply = read_reply(completion("123456789", tokens=None), HELLO)
    assert (reply.prompt_tokens, reply.completion_tokens) == (2, 3)


def test_half_a_character_does_not_break_the_next_request() -> None:
    reply = read_reply(completion("a\ud83d"), HELLO)
    assert reply.text == "a?"


def test_no_request_is_sent_once_the_budget_is_spent(fake: FakeEndpoint) -> None:
    client = endpoint(fake, token_budget=220)
    say(client)
    say(client)
    with pytest.raises(StoppedError, match="token_budget=220 is spent"):
        say(client)
    assert (client.spent, len(fake.bodies)) == (220, 2)


def test_a_stopped_endpoint_sends_nothing(fake: FakeEndpoint) -> None:
    client = endpoint(fake)
    client.stop()
    with pytest.raises(StoppedError):
        say(client)
    assert not fake.bodies


def test_a_wrong_key_ends_the_run_and_is_shown_nowhere(fake: FakeEndpoint) -> None:
    fake.think = replies(error(401, f"Incorrect API key provided: {SECRET}"))
    with pytest.raises(EndpointError) as caught:
        say(endpoint(fake))
    text = str(caught.value)
    assert "401" in text
    assert "api_key_env=SOME_KEY" in text
    assert "the key in it is refused" in text
    assert "Incorrect API key provided: ***" in text
    assert "export SOME_KEY=" in text
    assert SECRET not in text
    assert caught.value.__context__ is None, "a traceback would print what the endpoint echoed"
    assert len(fake.bodies) == 1, "a key does not become right"


@pytest.mark.parametrize(
    ("status", "message", "told"),
    [
        (401, "no key", "that variable is not set"),  # and not that the key is wrong
        (404, "no such model", r"does not know model=some/model(.|\n)*Type model="),
        (429, "slow down", r"after 3 attempts(.|\n)*slow down(.|\n)*concurrency="),
    ],
)
def test_what_only_a_person_can_mend_ends_the_run_and_says_what_to_type(
    fake: FakeEndpoint, status: int, message: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SOME_KEY")
    fake.think = replies(error(status, message))
    with pytest.raises(EndpointError, match=told):
        say(endpoint(fake))


@pytest.mark.parametrize(
    ("status", "message", "code"),
    [
        (400, "too many tokens", "context_length_exceeded"),
        (400, "This model's maximum context length is 4096 tokens.", None),
        (400, "the request exceeds the available context size", None),
        (400, "prompt is too long: 9000 tokens > 8000 maximum", None),
        (
            400,
            "You passed 1001 input tokens and requested 24 output tokens. However, the model's "
            "context length is only 1024 tokens, resulting in a maximum input length of 1000.",
            None,
        ),
        (400, "The input (9000 tokens) is longer than the model's context length (8192)", None),
        (400, "The input token count (9000) exceeds the maximum number of tokens allowed.", None),
        (422, "`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 4000 and 512", None),
        (
            400,
            "Token indices sequence length is longer than the specified maximum sequence length "
            "for this model (9000 > 8192)",
            None,
        ),
        (413, "Please reduce the length of the messages", "request_too_large"),
    ],
)
def test_a_full_context_is_no_failure_of_the_endpoint(
    fake: FakeEndpoint, status: int, message: str, code: str | None
) -> None:
    fake.think = replies(error(status, message, code))
    client, handled = endpoint(fake), Counter[str]()
    for _ in range(GIVE_UP_AFTER + 1):
        with pytest.raises(ContextFullError):
            say(client, handled=handled)
    assert handled == {"context_full": GIVE_UP_AFTER + 1}


@pytest.mark.parametrize(
    "message",
    [
        "Unsupported parameter: 'max_tokens'",
        "max_tokens is too large: 99999. This model supports at most 16384 completion tokens.",
        "temperature must be at most 2",
    ],
)
def test_a_setting_that_cannot_be_passes_for_a_full_context(
    fake: FakeEndpoint, message: str
) -> None:
    fake.think = replies(error(400, message))
    with pytest.raises(RequestError) as caught:
        say(endpoint(fake))
    assert not isinstance(caught.value, ContextFullError)


@pytest.mark.parametrize(
    ("answer", "kind", "text"),
    [
        (completion("no"), None, "no"),
        (completion(""), "empty", ""),
        (completion(None, finish_reason="content_filter"), "refusal", ""),
        (completion("I c", finish_reason="content_filter"), "refusal", "I c"),
        (error(400, "The prompt triggered the policy", "content_filter"), "refusal", ""),
    ],
)
def test_a_reply_out_of_the_ordinary_breaks_nothing_and_is_counted(
    fake: FakeEndpoint, answer: Answer | str, kind: str | None, text: str
) -> None:
    fake.think = replies(answer if isinstance(answer, Answer) else Answer(answer))
    handled = Counter[str]()
    reply = say(endpoint(fake), handled=handled)
    assert (reply.text, reply.kind) == (text, kind)
    assert handled == ({kind: 1} if kind else {})


def message(**fields: Any) -> str:
    """A completion whose message has these fields."""
    body = json.loads(completion(fields.pop("content", None)))
    body["choices"][0]["message"].update(fields)
    return json.dumps(body)


def test_refusals_calls_and_reasoning_are_read_from_where_they_are() -> None:
    refused = read_reply(message(refusal="I cannot help."), HELLO)
    assert (refused.text, refused.kind) == ("I cannot help.", "refusal")
    calls = [
        {"id": "1", "function": {"name": "go", "arguments": '{"where": "north"}'}},
        {"id": "2", "function": {"name": "look", "arguments": "{half"}},
    ]
    called = read_reply(message(tool_calls=calls), HELLO)
    assert called.kind == "tool_call"
    assert called.text == (
        '<tool_call>\n{"name": "go", "arguments": {"where": "north"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "look", "arguments": "{half"}\n</tool_call>'
    )
    for field in ("reasoning_content", "reasoning"):
        thought = read_reply(message(content="yes", **{field: "hm"}), HELLO)
        assert (thought.text, thought.reasoning, thought.kind) == ("yes", "hm", None)
        cut = read_reply(message(**{field: "hm"}), HELLO)
        assert (cut.text, cut.reasoning, cut.kind) == ("", "hm", "reasoning_only")
    parts = [{"type": "thinking", "thinking": []}, {"type": "text", "text": "yes"}]
    assert read_reply(message(content=parts), HELLO).text == "yes"


def test_what_goes_wrong_on_the_way_is_counted_and_a_broken_connection_breaks_one_episode(
    fake: FakeEndpoint,
) -> None:
    cut = Answer(completion("half of this"), cut=True)
    fake.think = replies(cut, error(429, "slow down"), error(503, "busy"), Answer("<html>"), "hi")
    handled = Counter[str]()
    assert say(endpoint(fake, max_retries=3), handled=handled).text == "hi"
    assert handled == {"dropped": 1, "rate_limited": 1, "server_error": 1, "malformed": 1}
    fake.think = replies(cut)
    with pytest.raises(RequestError, match="the connection broke, after 1 attempts") as caught:
        say(endpoint(fake, max_retries=0))
    assert not isinstance(caught.value, EndpointError)


def test_a_wish_for_a_pause_is_granted(fake: FakeEndpoint) -> None:
    limited = Answer('{"error": {"message": "slow down"}}', 429, {"Retry-After": "1"})
    fake.think = replies(limited, "hi")
    start = time.monotonic()
    assert say(endpoint(fake)).text == "hi"
    assert time.monotonic() - start >= 0.9


def test_many_failures_in_a_row_end_the_run_and_a_success_between_does_not(
    fake: FakeEndpoint,
) -> None:
    client = endpoint(fake, max_retries=0)
    refused = error(400, "Unsupported parameter: 'max_tokens'")
    for answers in ([refused] * (GIVE_UP_AFTER - 1) + ["hi"]) * 2:
        fake.think = replies(answers)
        if isinstance(answers, str):
            say(client)
        else:
            with pytest.raises(RequestError, match="Unsupported parameter"):
                say(client)
    fake.think = replies(refused)
    for _ in range(GIVE_UP_AFTER - 1):
        with pytest.raises(RequestError):
            say(client)
    with pytest.raises(EndpointError, match=f"{GIVE_UP_AFTER} requests in a row failed"):
        say(client)


def test_an_address_where_nobody_is_shows_at_once() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
    with pytest.raises(EndpointError, match=r"Nothing answers at base_url=(.|\n)*Type base_url="):
        Endpoint("m", url, max_retries=1000).check()


@pytest.mark.parametrize("answer", [Answer("{}"), error(404, "no list"), Answer("<html>")])
def test_an_endpoint_without_a_list_of_models_is_played_with(
    fake: FakeEndpoint, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake.RequestHandlerClass, "do_GET", lambda handler: handler._send(answer))
    endpoint(fake).check()


def test_every_option_that_cannot_be_is_told_at_once_and_no_secret_repeated() -> None:
    with pytest.raises(ValueError, match="model=null: type model=") as caught:
        Endpoint(
            None,
            "http://user:hunter2@host/v1",
            api_key_env="sk-123",
            timeout_s=0,
            max_retries=-1,
            token_budget=0,
        )
    text = str(caught.value)
    for part in ("base_url: allowed is", "api_key_env: allowed", "timeout_s=0", "max_retries=-1"):
        assert part in text
    assert "token_budget=0" in text
    assert "hunter2" not in text
    assert "sk-123" not in text


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "http://", "http://h/v1?key=x"])
def test_a_strange_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="base_url: allowed is"):
        Endpoint("m", url)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"pip install 'aem-lightning\[api\]'"):
        Endpoint("m", "http://127.0.0.1:1/v1")
