"""The page of a live run: a server on this machine alone, which reads what the run appends."""

from __future__ import annotations

import contextlib
import errno
from dataclasses import asdict
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from aem_lightning.card import run_card
from aem_lightning.viewer.episodes import NAME, Wish, read_part
from aem_lightning.viewer.page import as_json, numbered, page, plain_card

HOST = "127.0.0.1"


def server(path: Path, port: int, wish: Wish) -> ThreadingHTTPServer:
    """A server of the episodes that are wished for; ``serve_forever`` begins, on any thread.

    Args:
        path: A run's folder, with or without transcripts yet, or a transcripts file.
        port: Of 127.0.0.1; 0 takes one that is free.
        wish: Which episodes.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: The port is taken, or not this user's to take.
    """
    file = path / NAME if path.is_dir() else path
    if not file.parent.is_dir() or (path.suffix != ".jsonl" and not path.is_dir()):
        raise FileNotFoundError(
            f"{path}: there is no such folder. Training writes logs/<name>/<time>, an evaluation "
            "logs/eval/<time>"
        )
    try:
        return ThreadingHTTPServer((HOST, port), partial(_Handler, file, wish))
    except (OSError, OverflowError) as error:
        is_taken = getattr(error, "errno", None) == errno.EADDRINUSE
        why = "is taken" if is_taken else f"cannot be had ({error})"
        told = f"--port {port} {why}: type another, or --port 0 for a free one"
        raise ValueError(told) from error


class _Handler(BaseHTTPRequestHandler):
    """Answers one request: the page, or the episodes behind an offset."""

    def __init__(self, file: Path, wish: Wish, *given: Any) -> None:
        self._file, self._wish = file, wish
        super().__init__(*given)  # which answers

    def do_GET(self) -> None:
        """Answer; a browser that has gone is no error."""
        address = urlsplit(self.path)
        with contextlib.suppress(ConnectionError):
            # A page of another site may have pointed its own name at this machine.
            if self.headers.get("Host", HOST).rsplit(":", 1)[0] not in (HOST, "localhost"):
                self.send_error(403, f"Ask for localhost or {HOST}")
            elif address.path == "/":
                text = page({}, str(self._file.parent), run_card(self._file.parent), live=True)
                self._send(text, "text/html")
            elif address.path == "/episodes":
                self._send_episodes(parse_qs(address.query))
            else:
                self.send_error(404)

    def log_message(self, *_: Any) -> None:
        """Nothing: a page asks every other second."""

    def _send_episodes(self, query: dict[str, list[str]]) -> None:
        asked = [query.get(name, ["0"])[0] for name in ("offset", "number")]
        if not all(each.isdecimal() for each in asked):
            self.send_error(400)
            return
        part = read_part(self._file, *map(int, asked))
        wanted = {n: record for n, record in part.episodes.items() if self._wish.fits(record)}
        card = plain_card(run_card(self._file.parent))
        content = {**asdict(part), "episodes": numbered(wanted), "card": card}
        self._send(as_json(content), "application/json")

    def _send(self, text: str, kind: str) -> None:
        content = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)
