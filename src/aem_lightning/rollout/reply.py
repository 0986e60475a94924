"""What comes back from ``/chat/completions``, as a reply, whatever an endpoint makes of one.

A reply without a text is still a reply: it is told apart by its kind, and counted.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from aem_lightning.types import FinishReason

Message = Mapping[str, Any]
"""A message of a chat: its ``role`` and its ``content``, a text; with calls, ``tool_calls``."""

# What an endpoint counts as a token where it does not count: about that many characters.
CHARACTERS_PER_TOKEN = 4


class MalformedReplyError(RuntimeError):
    """An answer that is no chat completion."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model said.

    Attributes:
        text: The reply; the words of a refusal, and the calls of tools as Hermes writes them, where
            there is nothing else.
        finish_reason: ``length`` where the limit on its tokens cut it.
        prompt_tokens: Tokens of the conversation, as the endpoint counts them.
        completion_tokens: Tokens of the reply, unseen reasoning included.
        reasoning: What was thought before, where the endpoint hands it over by itself.
        calls: The calls of tools, as the endpoint says them.
        kind: Why it is no ordinary one: the model or a filter refused, called tools in place of an
            answer, never came to the end of its reasoning, or said nothing. ``None``: it is one.
    """

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    reasoning: str = ""
    calls: Sequence[Mapping[str, Any]] = ()
    kind: Literal["refusal", "tool_call", "reasoning_only", "empty"] | None = None

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


def read_reply(text: str, messages: Sequence[Message]) -> Reply:
    """The answer of ``/chat/completions`` as a reply.

    Where the endpoint counts no tokens they are taken to be of four characters each.

    Raises:
        MalformedReplyError: It is no chat completion.
    """
    try:
        answer = json.loads(text)
        choice = answer["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        said = _readable(message.get("content") or "")
        reasoning = _readable(message.get("reasoning_content") or message.get("reasoning") or "")
        refusal = _readable(message.get("refusal") or "")
        called = message.get("tool_calls") or ()
        calls = written_calls(called)
        kind: Any = None
        if refusal or finish == "content_filter":
            kind = "refusal"
        elif not said:
            kind = "tool_call" if calls else "reasoning_only" if reasoning else "empty"
        said = said or refusal or calls
        usage = answer.get("usage") or {}
        asked = sum(len(message["content"]) for message in messages)
        return Reply(
            text=said,
            finish_reason="length" if finish == "length" else "stop",
            prompt_tokens=_count(usage.get("prompt_tokens"), asked),
            completion_tokens=_count(usage.get("completion_tokens"), len(said) + len(reasoning)),
            reasoning=reasoning,
            calls=called,
            kind=kind,
        )
    except (ValueError, LookupError, TypeError, AttributeError):
        raise MalformedReplyError(repr(text[:200])) from None


def _readable(content: str | Iterable[Mapping[str, Any]]) -> str:
    """The text of a content, which may come in parts."""
    if not isinstance(content, str):
        content = "".join(part.get("text") or "" for part in content)
    return content.encode(errors="replace").decode()  # half a surrogate pair fits no request


def written_calls(calls: Iterable[Mapping[str, Any]]) -> str:
    """Calls of tools as Hermes writes them."""
    lines = []
    for call in calls:
        function = call["function"]
        given = function.get("arguments") or "{}"
        with contextlib.suppress(ValueError):  # usually JSON inside a string
            given = json.loads(given) if isinstance(given, str) else given
        called = {"name": function["name"], "arguments": given}
        lines.append(f"<tool_call>\n{json.dumps(called, ensure_ascii=False)}\n</tool_call>")
    return _readable("\n".join(lines))


def _count(tokens: int | None, characters: int) -> int:
    return int(tokens) if tokens is not None else -(-characters // CHARACTERS_PER_TOKEN)
