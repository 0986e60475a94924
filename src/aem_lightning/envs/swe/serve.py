"""A host of sandboxes for other machines: ``python -m aem_lightning.envs.swe.serve --port 8700``.

It speaks the protocol of `aem_lightning.envs.swe.sandbox.remote`. Who has the token can run any
command in its sandboxes; without TLS, a network that is not one's own reads it.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hmac
import json
import logging
import os
import select
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from aem_lightning.envs.base import EnvPoolError
from aem_lightning.envs.swe.sandbox import CommandResult, Limits, Sandbox, Session, SessionSpec
from aem_lightning.envs.swe.sandbox.remote import FULL, TOKEN
from aem_lightning.envs.swe.settings import SweSettings, choose_sandbox

logger = logging.getLogger(__name__)

LONGEST = 256 << 20  # bytes of a request, a repository's archive in base 64
SILENCE_S = 60.0  # that a connection may have before it has a session


@dataclass
class Host:
    """What all connections share.

    Attributes:
        choose: The sandbox for instances that are images, or not.
        token: What a client has to know.
        sessions: So many at once.
        opened: Those at work.
    """

    choose: Callable[[bool], Sandbox]
    token: str
    sessions: int
    places: threading.Semaphore = field(init=False)
    opened: set[Session] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self.places = threading.Semaphore(self.sessions)

    def close(self) -> None:
        """End every session."""
        for session in list(self.opened):
            session.close()


class HostHandler(BaseHTTPRequestHandler):
    """One connection, and the session that lives as long as it."""

    protocol_version = "HTTP/1.1"
    timeout = SILENCE_S
    host: Host  # set in a subclass
    session: Session | None = None

    def setup(self) -> None:
        """A client whose machine is gone is noticed in minutes."""
        super().setup()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if sys.platform == "linux":
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def finish(self) -> None:
        """End the session with the connection."""
        session, self.session = self.session, None
        if session is not None:
            session.close()
            self.host.opened.discard(session)
            self.host.places.release()
        super().finish()

    def do_GET(self) -> None:
        """What isolates here."""
        if self._may():
            try:
                sandbox = self.host.choose(self.path.endswith("images=1"))
                found = asdict(sandbox.probe())
            except (ValueError, EnvPoolError) as error:
                found = {"usable": False, "level": 0, "reason": str(error)}
            self._answer(200, found)

    def do_POST(self) -> None:
        """Open the session, or run a command in it."""
        if not self._may():
            return
        try:
            size = int(self.headers.get("Content-Length", ""))
            if not 0 <= size <= LONGEST:
                raise ValueError(f"a request has at most {LONGEST} bytes")
            request = json.loads(self.rfile.read(size))
            if self.path == "/open":
                self._open(request)
            elif self.path == "/run" and self.session is not None:
                self._run(self.session, request)
            else:
                self._answer(404, {"error": f"{self.path}: there is no such thing, or no session"})
        except (ValueError, TypeError, LookupError, AttributeError, EnvPoolError) as error:
            self.close_connection = True  # what is left of the request may not be the next one
            self._answer(400, {"error": f"{type(error).__name__}: {error}"})

    def log_message(self, format: str, *args: object) -> None:
        """Requests are as many as commands; nobody reads them."""

    def _open(self, request: dict[str, Any]) -> None:
        if self.session is not None:
            raise ValueError("a connection has one session")
        spec = SessionSpec(**{**request["spec"], "limits": Limits(**request["spec"]["limits"])})
        sandbox = self.host.choose(bool(request.get("images")))
        if not self.host.places.acquire(blocking=False):
            self._answer(FULL, {"error": f"all {self.host.sessions} sessions are taken"})
            return
        try:
            self.session = sandbox.open(spec)
        except BaseException:
            self.host.places.release()
            raise
        self.host.opened.add(self.session)
        self.connection.settimeout(None)
        self._answer(200, {})

    def _run(self, session: Session, request: dict[str, Any]) -> None:
        stdin = request.pop("stdin")
        request["stdin"] = None if stdin is None else base64.b64decode(stdin)
        with ThreadPoolExecutor(1) as one:
            running = one.submit(session.run, **request)
            while wait([running], timeout=0.2).not_done:
                if select.select([self.connection], [], [], 0)[0]:
                    session.close()  # a client that says something now has hung up
                    self.close_connection = True
                    return
            result: CommandResult = running.result()
        answer = asdict(result)
        del answer["output"]
        self._answer(200, answer | {"data": base64.b64encode(result.data).decode()})

    def _may(self) -> bool:
        given = self.headers.get("Authorization", "").encode()
        if hmac.compare_digest(given, f"Bearer {self.host.token}".encode()):
            return True
        self.close_connection = True
        self._answer(401, {"error": f"the token is not that of this host; both read {TOKEN}"})
        return False

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:  # the client is gone
            self.close_connection = True


def make_server(address: tuple[str, int], host: Host) -> ThreadingHTTPServer:
    """The server, which listens already."""
    handler = type("Handler", (HostHandler,), {"host": host})
    server = ThreadingHTTPServer(address, handler)
    server.daemon_threads = True
    return server


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Run sandboxes for other machines.")
    parser.add_argument("--address", default="127.0.0.1", help="to listen at; 0.0.0.0: all")
    parser.add_argument("--port", type=int, default=8700)
    parser.add_argument("--sandbox", default="auto", help="auto, bubblewrap, docker or local")
    parser.add_argument("--allow-unsafe", action="store_true", help="also without isolation")
    parser.add_argument("--image", help="for docker: one with git, python3 and pytest")
    parser.add_argument("--images-gb", type=float, help="of pulled images, before some go")
    parser.add_argument("--sessions", type=int, default=64, help="at once")
    parser.add_argument("--certificate", help="for https: a PEM file, the key in it")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    token = os.environ.get(TOKEN, "")
    if len(token) < 16 or not token.isascii():
        parser.error(f"export {TOKEN}=$(openssl rand -hex 32): a token of 16 characters or more")
    settings = SweSettings(
        given.sandbox, given.allow_unsafe, image=given.image, images_gb=given.images_gb
    )

    @cache
    def choose(images: bool) -> Sandbox:
        return choose_sandbox(settings, has_images=images)

    host = Host(choose, token, given.sessions)
    server = make_server((given.address, given.port), host)
    if given.certificate:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(given.certificate)
        # The handshake is for the connection's own thread: one that waits holds up no other.
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    scheme = "https" if given.certificate else "http"
    logger.info("Sandboxes at %s://%s:%d", scheme, given.address, server.server_port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a service manager's Ctrl-C
    with contextlib.suppress(KeyboardInterrupt), contextlib.closing(host):
        server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
