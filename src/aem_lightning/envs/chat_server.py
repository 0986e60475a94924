"""A local endpoint in the manner of OpenAI's, whose calls somebody else in this process answers."""

from __future__ import annotations

import json
import logging
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import SimpleQueue
from typing import Any

log = logging.getLogger(__name__)

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"} | {
    "tool": "tool"
}

USED = {"model", "messages", "tools", "stream", "stream_options", "n", "user", "metadata", "store"}
_warned: set[str] = set()


class BadCallError(ValueError):
    """A request that is not answered; its text says why."""


@dataclass(frozen=True)
class Sent:
    """What a call has sent: messages and tools as chat templates take them."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    model: str = ""
    stream: bool = False
    ignored: tuple[str, ...] = ()

    @classmethod
    def of(cls, body: Any) -> Sent:
        """The call that a request's ``body`` makes.

        Raises:
            BadCallError: It is none that can be answered.
        """
        if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
            raise BadCallError("messages: a list is expected")
        if not body["messages"]:
            raise BadCallError("messages: the list is empty")
        if body.get("n") not in (None, 1):
            raise BadCallError(f"n={body['n']}: a call has one reply here; call n times")
        if body.get("functions"):
            raise BadCallError("functions: the older way is not read; send tools")
        given = [name for name, value in body.items() if value is not None and name not in USED]
        messages = [_message(number, each) for number, each in enumerate(body["messages"])]
        tools = body.get("tools") or None
        return cls(messages, tools, str(body.get("model")), bool(body.get("stream")), (*given,))

    def observation(self) -> str:
        """What is new in it: all behind the last reply."""
        replies = [n for n, each in enumerate(self.messages) if each["role"] == "assistant"]
        new = self.messages[replies[-1] + 1 :] if replies else self.messages
        return "\n\n".join(message["content"] for message in new)

    def completion(self, action: str, turn: int) -> dict[str, Any]:
        """The answer of an endpoint that says ``action``: a text, or calls as JSON."""
        content, calls = action, []
        try:
            said = json.loads(action)
            named = {tool["function"]["name"] for tool in self.tools or ()}
            if all(call["name"] in named for call in said["tool_calls"]):
                content, calls = said["content"], said["tool_calls"]
            else:
                content = said["text"]
        except (ValueError, LookupError, TypeError):
            pass  # a text that is no call
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if calls:
            message["content"] = content or None
            message["tool_calls"] = [
                # Nine letters and digits: Mistral's templates take no other id.
                {"id": f"c{turn % 10**5:05}{number % 1000:03}", "type": "function"}
                | {"function": self._function(call)}
                for number, call in enumerate(calls)
            ]
        end = "tool_calls" if calls else "stop"
        choice = {"index": 0, "message": message, "finish_reason": end, "logprobs": None}
        return {
            "id": f"chatcmpl-{turn}",
            "object": "chat.completion",
            "created": 0,
            "model": self.model,
            "choices": [choice],
            # Agents read it; what was counted is the run's to know.
            "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
            "ignored": list(self.ignored),
        }

    def _function(self, call: Mapping[str, Any]) -> dict[str, str]:
        """A call in an answer; arguments that were written as texts, as its tool wants them."""
        arguments = call["arguments"]
        if call.get("are_texts"):
            tools = {tool["function"]["name"]: tool["function"] for tool in self.tools or ()}
            known = (tools[call["name"]].get("parameters") or {}).get("properties") or {}
            arguments = {key: _typed(text, known.get(key)) for key, text in arguments.items()}
        return {"name": call["name"], "arguments": json.dumps(arguments)}


@dataclass(eq=False)
class Call:
    """A call that waits: what it sent, and where its reply goes; ``None``: nobody answers."""

    sent: Sent
    reply: SimpleQueue[dict[str, Any] | None] = field(default_factory=SimpleQueue)


class ChatServer(ThreadingHTTPServer):
    """The server of a process: an address for every episode, by a key in its path."""

    daemon_threads = True
    request_queue_size = 128
    _one: ChatServer | None = None
    _users = 0
    _lock = threading.Lock()

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.takers: dict[str, Callable[[Call], None]] = {}
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @classmethod
    def shared(cls) -> ChatServer:
        """The server of this process, which `release` gives back."""
        with cls._lock:
            cls._one = cls._one or cls()
            cls._users += 1
            return cls._one

    def release(self) -> None:
        """Stop where nobody else has it."""
        with self._lock:
            ChatServer._users -= 1
            if ChatServer._users:
                return
            ChatServer._one = None
        self.shutdown()
        self.server_close()

    def open(self, take: Callable[[Call], None]) -> str:
        """The base URL whose calls ``take`` is given."""
        key = secrets.token_hex(16)
        self.takers[key] = take
        return f"http://127.0.0.1:{self.server_port}/{key}/v1"

    def shut(self, take: Callable[[Call], None]) -> None:
        """Take no more calls for ``take``."""
        for key in [key for key, other in self.takers.items() if other == take]:
            del self.takers[key]


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_GET(self) -> None:
        models = [{"id": "policy", "object": "model", "created": 0, "owned_by": "aem_lightning"}]
        self._send(200, {"object": "list", "data": models})

    def do_POST(self) -> None:
        key, _, path = self.path.strip("/").partition("/")
        take = self.server.takers.get(key)
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path != "v1/chat/completions":
            self._refuse(404, f"/{path}: this endpoint has /v1/chat/completions alone")
        elif take is None:
            self._refuse(410, "this episode is over")
        else:
            try:
                sent = Sent.of(json.loads(data))
            except ValueError as error:
                return self._refuse(400, str(error))
            if new := set(sent.ignored) - _warned:
                _warned.update(new)
                log.warning("The run decides on %s; the agent's are ignored", ", ".join(new))
            call = Call(sent)
            take(call)
            reply = call.reply.get()
            if reply is None:
                self._refuse(410, "this episode is over")
            elif sent.stream:
                self._stream(reply)
            else:
                self._send(200, reply)
        return None

    def _refuse(self, status: int, message: str) -> None:
        kind = "invalid_request_error"
        self._send(status, {"error": {"message": message, "type": kind, "code": None}})

    def _send(self, status: int, body: Mapping[str, Any]) -> None:
        self._write(status, "application/json", json.dumps(body))

    def _stream(self, reply: dict[str, Any]) -> None:
        """The whole reply as one chunk."""
        (choice,) = reply["choices"]
        delta = dict(choice["message"])
        calls = delta.get("tool_calls") or ()
        if calls:
            delta["tool_calls"] = [{"index": n, **call} for n, call in enumerate(calls)]
        piece = {**choice, "delta": delta}
        del piece["message"]
        chunk = {**reply, "object": "chat.completion.chunk", "choices": [piece]}
        self._write(200, "text/event-stream", f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n")

    def _write(self, status: int, kind: str, text: str) -> None:
        data = text.encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the agent has given up

    def log_message(self, *_: Any) -> None:
        """Silent."""


def _message(number: int, given: Any) -> dict[str, Any]:
    """A message in the words of chat templates.

    Raises:
        BadCallError: It is none, or more than text.
    """
    where = f"messages[{number}]"
    role = given.get("role") if isinstance(given, dict) else None
    if role not in ROLES:
        raise BadCallError(f"{where}: role={role!r}; known are {', '.join(ROLES)}")
    message: dict[str, Any] = {"role": ROLES[role], "content": _text(where, given.get("content"))}
    if calls := given.get("tool_calls"):
        message["tool_calls"] = [_tool_call(where, call) for call in calls]
    names = ("name", "tool_call_id")
    return message | {name: str(given[name]) for name in names if given.get(name)}


def _text(where: str, content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts: Sequence[Any] = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise BadCallError(f"{where}: content of another kind than text cannot be read here")
    return "".join(map(str, texts))


def _typed(text: str, schema: Any) -> Any:
    """An argument that was written as a text; itself where its schema wants one, or is open."""
    told = schema if isinstance(schema, dict) else {}
    kinds = [each.get("type") for each in (told, *(told.get("anyOf") or ()))]
    if not any(kinds) or any(kind == "string" or "string" in (kind or ()) for kind in kinds):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _tool_call(where: str, call: Any) -> dict[str, Any]:
    try:
        function = call["function"]
        given = function.get("arguments") or "{}"
        arguments = dict(json.loads(given) if isinstance(given, str) else given)
        name, key = str(function["name"]), str(call.get("id") or "")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadCallError(f"{where}: a tool call without name and arguments: {error}") from None
    return {"id": key, "type": "function", "function": {"name": name, "arguments": arguments}}
