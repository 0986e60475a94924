"""Sessions on other machines, each of which runs ``python -m aem_lightning.envs.swe.serve``.

The protocol is HTTP/1.1 with JSON, and a connection is a session: what one opened ends with it.

.. code-block:: text

    every request     Authorization: Bearer TOKEN
    GET  /probe?images=0|1    -> {"usable": bool, "level": int, "reason": str}
    POST /open  {"spec": {"workdir", "limits", "image", "environment"}, "images": bool}    -> {}
    POST /run   {"command", "wall_s", "cwd", "stdin", "output_bytes"}
                -> {"code", "data", "timed_out", "truncated", "seconds", "infra_error"}
    any error         a status of 400 or more, {"error": str}; 503: no more sessions

``stdin`` and ``data`` are bytes in base 64. A client asks one thing at a time.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from aem_lightning.envs.swe.sandbox.base import (
    KILLED,
    CommandResult,
    Isolation,
    Level,
    SessionSpec,
)
from aem_lightning.envs.swe.sandbox.session import GRACE_S, UNPACK

log = logging.getLogger(__name__)

TOKEN = "AEM_SWE_TOKEN"  # the environment variable that holds it, on both sides
CONNECT_S = 10.0
OPEN_S = 60.0  # a container may take a while
PULL_S = 1860.0  # and so may its image, which the host fetches first: it gives that half an hour
LOST_S = 60.0  # that a host which was lost is left alone
FULL = 503


class HostError(Exception):
    """A host that does not do what it is asked.

    Attributes:
        lost: It does not answer at all.
    """

    def __init__(self, message: str, *, lost: bool) -> None:
        super().__init__(message)
        self.lost = lost


class RemoteSandbox:
    """Sessions on the machines of a list, in turn; one that is lost is left out for a while.

    Args:
        hosts: Their addresses, ``http://NAME:PORT`` or ``https://NAME:PORT``.
        images: Instances are container images.
        token: Of the servers; by default what the variable ``AEM_SWE_TOKEN`` holds.

    Raises:
        ValueError: There is no host, one that is no address, or no token.
    """

    name = "remote"

    def __init__(
        self, hosts: Sequence[str], *, images: bool = False, token: str | None = None
    ) -> None:
        if not hosts or isinstance(hosts, str):
            raise ValueError(
                f"datamodule.environment.hosts={hosts!r}: sandbox=remote needs a list of hosts; "
                "type 'datamodule.environment.hosts=[http://NAME:8700]'"
            )
        for host in hosts:
            if urlsplit(host).scheme not in ("http", "https") or not urlsplit(host).hostname:
                raise ValueError(
                    f"datamodule.environment.hosts: {host!r} is no address such as http://NAME:8700"
                )
        self._token = token or os.environ.get(TOKEN, "")
        if not self._token:
            raise ValueError(
                f"sandbox=remote: the variable {TOKEN} is not set. Export the token that the hosts "
                f"were started with, and type datamodule.pass_environment=[{TOKEN}]"
            )
        self._hosts = list(dict.fromkeys(hosts))
        self._images = images
        self._turn = os.getpid()  # so that not every worker begins with the same
        self._lost: dict[str, float] = {}  # until when

    def probe(self) -> Isolation:
        """Ask every host; the level is that of the weakest which can be used."""
        found: list[Level] = []
        said = []
        # One that was lost a moment ago is asked where nothing else answers.
        asked = sorted(self._hosts, key=lambda host: self._lost.get(host, 0.0))
        for host in asked:
            if found and self._lost.get(host, 0.0) > time.monotonic():
                said.append(f"{host}: it was lost a moment ago")
                continue
            try:
                with contextlib.closing(Connection(host, self._token)) as connection:
                    answer = connection.ask("GET", f"/probe?images={int(self._images)}")
                said.append(f"{host}: {answer['reason']}")
                found += [Level(answer["level"])] * bool(answer["usable"])
            except (HostError, KeyError, ValueError) as error:
                self._leave_out(host)
                said.append(f"{host}: {error}")
        return Isolation(bool(found), min(found, default=Level.NONE), "; ".join(said))

    def open(self, spec: SessionSpec) -> RemoteSession:
        """A session on the next host that has room; without one, its first result says why."""
        self._turn += 1
        at = self._turn % len(self._hosts)
        now = time.monotonic()
        hosts = self._hosts[at:] + self._hosts[:at]
        hosts.sort(key=lambda host: self._lost.get(host, 0) > now)  # these are the last resort
        said = []
        for host in hosts:
            connection = Connection(host, self._token)
            try:
                asked = {"spec": asdict(spec), "images": self._images}
                connection.ask("POST", "/open", asked, PULL_S if spec.image else OPEN_S)
            except HostError as error:
                connection.close()
                said.append(f"{host}: {error}")
                if error.lost:
                    self._leave_out(host)
                continue
            self._lost.pop(host, None)
            return RemoteSession(spec, connection, on_loss=lambda host=host: self._leave_out(host))
        return RemoteSession(spec, None, why="no host opens a session: " + "; ".join(said))

    def _leave_out(self, host: str) -> None:
        if host not in self._lost:
            log.warning("The host %s is lost and left out; it is tried again now and then.", host)
        self._lost[host] = time.monotonic() + LOST_S


@cache
def remote_sandbox(hosts: tuple[str, ...], images: bool) -> RemoteSandbox:
    """The one of a process, so that all its episodes know which hosts are lost."""
    return RemoteSandbox(hosts, images=images)


class RemoteSession:
    """A session on another machine, over a connection of its own."""

    def __init__(
        self,
        spec: SessionSpec,
        connection: Connection | None,
        *,
        why: str = "the sandbox is closed",
        on_loss: Any = lambda: None,
    ) -> None:
        self._spec = spec
        self._connection = connection
        self._why = why
        self._on_loss = on_loss

    def run(
        self,
        command: str,
        *,
        wall_s: float | None = None,
        cwd: str | None = None,
        stdin: bytes | None = None,
        output_bytes: int | None = None,
    ) -> CommandResult:
        """As in every session; a host that is lost is what broke."""
        wall_s = self._spec.limits.wall_s if wall_s is None else wall_s
        request = {
            "command": command,
            "wall_s": wall_s,
            "cwd": cwd,
            "stdin": None if stdin is None else base64.b64encode(stdin).decode(),
            "output_bytes": output_bytes,
        }
        start = time.monotonic()
        if self._connection is None:
            return CommandResult(KILLED, "", infra_error=self._why)
        longest = 2 * (output_bytes or self._spec.limits.output_bytes) + 10_000
        try:
            seconds = wall_s + 2 * GRACE_S
            answer = self._connection.ask("POST", "/run", request, seconds, longest)
            data = base64.b64decode(answer.pop("data"))
            result = CommandResult(output=data.decode(errors="replace"), data=data, **answer)
        except (HostError, KeyError, TypeError, ValueError) as error:
            if getattr(error, "lost", False):
                self._on_loss()
            self._why = f"{self._connection.host}: {error}"
            self.close()
            seconds = time.monotonic() - start
            return CommandResult(KILLED, "", seconds=seconds, infra_error=self._why)
        if result.infra_error:
            self._why = result.infra_error
            self.close()
        return result

    def put_tar(self, data: bytes, path: str | None = None) -> CommandResult:
        """Unpack an archive below ``path``, by default the working folder."""
        return self.run(UNPACK, cwd=path, stdin=data)

    def alive(self) -> bool:
        """Whether another command can be run."""
        return self._connection is not None

    def close(self) -> None:
        """Hang up: the host then ends the session."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def __del__(self) -> None:
        self.close()


class Connection:
    """An HTTP connection to a host."""

    def __init__(self, host: str, token: str) -> None:
        self.host = host
        parts = urlsplit(host)
        secure = parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        self._http = kind(parts.hostname or "", parts.port, timeout=CONNECT_S)
        self._connected = False
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}

    def ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        seconds: float = OPEN_S,
        longest: int = 100_000,
    ) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            HostError: There is none, or it says what is wrong.
        """
        try:
            if not self._connected:
                self._connected = True
                self._http.connect()
                self._http.auto_open = 0  # another connection would be another session
                self._http.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                if hasattr(socket, "TCP_KEEPIDLE"):  # else a dead host is noticed after hours
                    self._http.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
            self._http.sock.settimeout(seconds)
            data = None if body is None else json.dumps(body).encode()
            self._http.request(method, path, data, self._headers)
            response = self._http.getresponse()
            text = response.read(longest + 1)
        except (OSError, http.client.HTTPException) as error:
            said = str(error) or type(error).__name__
            raise HostError(f"the host does not answer: {said}", lost=True) from error
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        if len(text) > longest or not isinstance(answer, dict):
            raise HostError("this is no host of sandboxes, or another version of it", lost=True)
        if response.status >= 400:
            message = f"{answer.get('error', '')} (status {response.status})"
            raise HostError(message, lost=response.status not in (400, 404, FULL))
        return answer

    def close(self) -> None:
        """Hang up."""
        self._http.close()
