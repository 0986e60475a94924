"""An OpenAI-compatible endpoint on this machine, with whatever manners a test wants of it."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar


@dataclass
class Answer:
    """What goes over the wire."""

    text: str
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    cut: bool = False  # the connection ends before the text does


def completion(
    text: str | None, *, tokens: tuple[int, int] | None = (100, 10), **choice: Any
) -> str:
    """The body of a good answer that says ``text``."""
    message = {"role": "assistant", "content": text}
    body: dict[str, Any] = {
        "id": "x",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", **choice}],
    }
    if tokens:
        body["usage"] = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
    return json.dumps(body)


def error(status: int, message: str, code: str | None = None, **headers: str) -> Answer:
    """A refusal, as endpoints word it; retries come at once."""
    quick = {"retry-after-ms": "1", **headers}
    return Answer(json.dumps({"error": {"message": message, "code": code}}), status, quick)


Server = TypeVar("Server", bound=ThreadingHTTPServer)
Think = Callable[[dict[str, Any]], Answer | str]


class FakeEndpoint(ThreadingHTTPServer):
    """The server; ``think`` answers a request's body, ``bodies`` and ``keys`` keep what came."""

    daemon_threads = True

    def __init__(self, think: Think) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.think = think
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Answering(BaseHTTPRequestHandler):
    """Answers each request with what `answer` makes of its body."""

    protocol_version = "HTTP/1.1"
    server: Any

    def answer(self, body: dict[str, Any]) -> Answer:
        raise NotImplementedError

    def do_POST(self) -> None:
        self._send(self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

    def _send(self, answer: Answer) -> None:
        time.sleep(answer.delay_s)
        data = answer.text.encode()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client gave up
            self.send_response(answer.status)
            headers = {"Content-Type": "application/json", **answer.headers}
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if answer.cut else data)
            self.close_connection = self.close_connection or answer.cut

    def log_message(self, *args: Any) -> None:
        """Silent."""


class _Handler(Answering):
    def do_GET(self) -> None:
        self._send(Answer('{"object": "list", "data": []}'))

    def answer(self, body: dict[str, Any]) -> Answer:
        fake = self.server
        with fake.lock:
            fake.bodies.append(body)
            fake.keys.append(self.headers.get("Authorization"))
            fake.at_once += 1
            fake.most_at_once = max(fake.most_at_once, fake.at_once)
        try:
            if self.path != "/v1/chat/completions":
                return error(404, f"no {self.path}")
            answer = fake.think(body)
            return answer if isinstance(answer, Answer) else Answer(completion(answer))
        finally:
            with fake.lock:
                fake.at_once -= 1


@contextlib.contextmanager
def running(fake: Server) -> Iterator[Server]:
    """The server while it answers, from a thread of its own."""
    thread = threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield fake
    finally:
        fake.shutdown()
        fake.server_close()
        thread.join()


def serving(think: Think) -> contextlib.AbstractContextManager[FakeEndpoint]:
    """A running endpoint."""
    return running(FakeEndpoint(think))
