"""A collector's prompts as chat messages, for models that are talked to in text.

That what a message says stays content, and never becomes control, is then the server's business.
"""

from __future__ import annotations

import json
import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aem_lightning.rollout.collector import Live
from aem_lightning.rollout.encoder import Memory
from aem_lightning.rollout.endpoint import Endpoint
from aem_lightning.rollout.engine import Result
from aem_lightning.rollout.prompt import Prompt
from aem_lightning.rollout.reply import Message, Reply, written_calls
from aem_lightning.rollout.tool_call import schemas
from aem_lightning.types import EnvStep, Trajectory


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """Stands where an encoder stands, for a model whose tokens are out of sight.

    Prompts are empty, since `ChatResponder` writes them as messages; an id is a character.
    """

    prompt: Prompt

    def first(self, step: EnvStep) -> list[int]:
        """Nothing: the prompt is a message."""
        return []

    def next(self, step: EnvStep, trajectory: Trajectory) -> list[int]:
        """Nothing: the prompt is a message."""
        return []

    def constraint(self, step: EnvStep) -> None:
        """None: what an endpoint may say is its own."""

    def encode(self, text: str) -> list[int]:
        """Characters as ids."""
        return [ord(character) for character in text]

    def decode(self, tokens: Sequence[int]) -> str:
        """Ids as characters."""
        return "".join(map(chr, tokens)).strip()


@dataclass(slots=True)
class ChatResponder:
    """A model behind an endpoint, as the responder of a collector; it waits for each reply.

    Under ``memory=window`` a prompt is one user message with the last turns; under ``transcript``
    it is the conversation so far. Log-probabilities are not known (NaN, one a token). With
    ``prompt.action=tool_call`` the endpoint is given the tools, and what it called is answered as
    a tool's word; its calls are read as text.

    Attributes:
        endpoint: Whom to ask.
        encoder: What the collector's ids mean.
        memory: ``window`` or ``transcript``.
        history_length: Past turns inside a window prompt.
        max_new_tokens: Longest reply.
        temperature: Of the sampling; ``None`` leaves it to the endpoint.
        live: The episodes in play.
        sent: The messages of every request so far.
        prompt_tokens: Tokens of all prompts so far.
        completion_tokens: Tokens of all replies so far.
        handled: What was out of the ordinary so far, by kind.
    """

    endpoint: Endpoint
    encoder: TextEncoder
    memory: Memory
    history_length: int
    max_new_tokens: int
    temperature: float | None
    live: dict[str, Live] = field(default_factory=dict, init=False)
    sent: list[list[Message]] = field(default_factory=list, init=False)
    prompt_tokens: int = field(default=0, init=False)
    completion_tokens: int = field(default=0, init=False)
    handled: Counter[str] = field(default_factory=Counter, init=False)
    _asked: deque[str] = field(default_factory=deque, init=False)
    _replies: dict[str, Reply] = field(default_factory=dict, init=False)
    _chats: dict[str, list[Message]] = field(default_factory=dict, init=False)

    def ask(self, live: Mapping[str, Live]) -> None:
        """Queue the prompts of ``live``."""
        self.live.update(live)
        self._asked.extend(live)

    def answers(self) -> Sequence[Result]:
        """The reply to the prompt that has waited longest.

        Raises:
            RuntimeError: What `Endpoint.reply` raises.
        """
        key = self._asked.popleft()
        self.sent.append(self.messages(key))
        reply = self.endpoint.reply(
            self.sent[-1],
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            handled=self.handled,
            tools=self.live[key].step.info.get("tools") or self._tools,
        )
        self._replies[key] = reply
        self.prompt_tokens += reply.prompt_tokens
        self.completion_tokens += reply.completion_tokens
        unknown = [math.nan] * reply.completion_tokens
        tokens = self.encoder.encode(self._read(reply))
        return [Result(key, tokens, unknown, None, reply.finish_reason, version=0, reused=0)]

    def _read(self, reply: Reply) -> str:
        """The reply as the prompt's format expects it, reasoning in think tags included."""
        prompt, text = self.encoder.prompt, reply.text
        expects_calls = self._tools or prompt.action == "chat"
        if expects_calls and (called := written_calls(reply.calls)) not in text:
            text = f"{text}\n{called}"
        expects = prompt.require_thinking and prompt.action not in ("plain", "react")
        if not (expects and reply.reasoning) or "</think>" in text:
            return text
        return f"<think>{reply.reasoning}</think>{text}"

    @property
    def _tools(self) -> list[dict[str, Any]] | None:
        prompt = self.encoder.prompt
        return schemas(prompt.tools) if prompt.action == "tool_call" else None

    def forget(self, keys: Iterable[str]) -> None:
        """Drop the conversations of finished episodes."""
        for key in keys:
            self.live.pop(key, None)
            self._chats.pop(key, None)
            self._replies.pop(key, None)

    def messages(self, key: str) -> list[Message]:
        """The conversation that the next reply answers."""
        prompt, item = self.encoder.prompt, self.live[key]
        step, turns = item.step, item.trajectory.turns
        if "messages" in step.info:  # of an agent of someone's own
            return [_as_sent(message) for message in step.info["messages"]]
        opening = [_message("system", prompt.system)] if prompt.system else []
        if not turns:
            self._chats[key] = [*opening, _message("user", prompt.first_message(step))]
        elif self.memory == "window":
            text = prompt.window_message(step, turns, self.history_length)
            self._chats[key] = [*opening, _message("user", text)]
        else:
            self._chats[key] += self._answered(key, prompt.next_message(step, turns))
        return list(self._chats[key])

    def _answered(self, key: str, answer: str) -> list[Message]:
        """The last reply, and the ``answer`` to it."""
        turn, reply = self.live[key].trajectory.turns[-1], self._replies[key]
        call = reply.calls[0] if self._tools and len(reply.calls) == 1 else {}
        if turn.action is None or not call.get("id"):
            said = turn.response or "..."  # some endpoints refuse an empty message
            return [_message("assistant", said), _message("user", answer)]
        said = "" if reply.text == written_calls(reply.calls) else reply.text
        return [
            {"role": "assistant", "content": said, "tool_calls": [call]},
            {"role": "tool", "content": answer, "tool_call_id": call["id"]},
        ]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _as_sent(message: Mapping[str, Any]) -> Message:
    """A message whose calls have their arguments as endpoints want them: a text."""
    calls = [
        {
            **call,
            "function": {
                **call["function"],
                "arguments": json.dumps(call["function"]["arguments"]),
            },
        }
        for call in message.get("tool_calls", ())
    ]
    return {**message, **({"tool_calls": calls} if calls else {})}
