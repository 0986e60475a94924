"""An agent written against an OpenAI client, turned inside out: its calls are the turns.

`reset` starts the agent's function in a thread, which waits at its first call: what that call sends
is the first observation. `step` hands the reply to the waiting call, and waits for the next one or
for what the function returns, the reward. Messages and tools go to the policy as they were sent,
under ``messages`` and ``tools`` in ``info``.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

from aem_lightning.envs.base import Reset, Step, import_extra
from aem_lightning.envs.chat_server import Call, ChatServer
from aem_lightning.envs.questions import Rows, outcome, task_number

JOIN_S = 2.0  # for a function that is left alone to notice


@dataclass(frozen=True)
class Ended:
    """What became of the agent's function."""

    value: Any = None
    error: BaseException | None = None


@dataclass(eq=False)
class Visit:
    """One run of the agent's function, and the calls that it has made and waits for."""

    events: SimpleQueue[Call | Ended] = field(default_factory=SimpleQueue)
    is_over: bool = False

    def take(self, call: Call) -> None:
        """A call has come; called by the server's threads."""
        self.events.put(call)
        if self.is_over:  # asked last: `end` finds it, or it finds the end
            call.reply.put(None)

    def end(self) -> None:
        """Let every call fail that waits or is yet to come."""
        self.is_over = True
        while True:
            try:
                event = self.events.get_nowait()
            except Empty:
                return
            if isinstance(event, Call):
                event.reply.put(None)


class AgentEnv:
    """One episode at a time of an agent's function.

    Args:
        rows: Of tasks; the function stands where others have a checker. It is given a client, or
            the address where its first argument is called ``base_url``, and the row.
        win_at: The reward of a success.
    """

    def __init__(self, rows: Rows, win_at: float = 1.0) -> None:
        self._rows, self._win_at = rows, win_at
        self._visit: Visit | None = None
        self._call: Call | None = None
        self._thread: threading.Thread | None = None
        self._server: ChatServer | None = None

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> Reset:
        """Start the function on the row of the task's number: its first call.

        Raises:
            RuntimeError: It returned without a call.
            Exception: What it raised.
        """
        self._leave()
        row = self._rows[task_number(options)]["row"]
        self._known = {"task_id": str((options or {})["task_id"])}
        self._server = self._server or ChatServer.shared()
        self._turn, self._visit = 0, Visit()
        url = self._server.open(self._visit.take)
        task = (_call_agent, self._rows.score, url, row, self._visit.events)
        self._thread = threading.Thread(target=task[0], args=task[1:], daemon=True)
        self._thread.start()
        observation, _, ended, _, info = self._next()
        if ended:
            raise RuntimeError(
                f"the agent {self._rows.score.__name__} returned without a call of "
                "client.chat.completions.create: there is nothing to train on"
            )
        return observation, info

    def step(self, action: str, /) -> Step:
        """Hand over a reply: the next call, or the reward.

        Raises:
            Exception: What the function raised.
            RuntimeError: It raised what would end this process, such as `SystemExit`.
        """
        assert self._call is not None
        reply = self._call.sent.completion(action, self._turn)
        self._call.reply.put(reply)
        self._call, self._turn = None, self._turn + 1
        return self._next()

    def close(self) -> None:
        """End the function; the server, where no other environment uses it."""
        self._leave()
        if self._server is not None:
            self._server.release()
            self._server = None

    def _next(self) -> Step:
        assert self._visit is not None
        event = self._visit.events.get()
        if isinstance(event, Call):
            self._call = event
            sent = event.sent
            info = {**self._known, "messages": sent.messages, "tools": sent.tools}
            return sent.observation(), 0.0, False, False, info
        self._leave()
        if isinstance(event.error, Exception):
            raise event.error
        if event.error is not None:
            raise RuntimeError(f"the agent raised {event.error!r}") from event.error
        reward, ended = outcome(event.value, self._win_at)
        return "", reward, True, False, self._known | ended

    def _leave(self) -> None:
        """Let a function that is under way find the line dead."""
        if self._visit is None or self._server is None or self._thread is None:
            return
        self._server.shut(self._visit.take)
        if self._call is not None:
            self._call.reply.put(None)
        self._visit.end()
        self._thread.join(JOIN_S)
        self._visit = self._call = self._thread = None


def _call_agent(
    agent: Callable[..., Any], url: str, row: Mapping[str, Any], events: SimpleQueue[Call | Ended]
) -> None:
    try:
        first = next(iter(inspect.signature(agent).parameters), "")
        events.put(Ended(_played(agent, url, row, by_url=first in ("base_url", "url"))))
    except BaseException as error:
        events.put(Ended(error=error))


def _played(agent: Callable[..., Any], url: str, row: Mapping[str, Any], *, by_url: bool) -> Any:
    """What the function returns; one that is a coroutine gets an asynchronous client."""
    is_async = inspect.iscoroutinefunction(agent)
    options = {"base_url": url, "api_key": "none", "max_retries": 0, "timeout": None}
    if by_url:
        return asyncio.run(agent(url, row)) if is_async else agent(url, row)
    openai = import_extra("openai", "api")
    # Certificates take a quarter of a second to read, and the way to this machine needs no proxy.
    light = {"verify": False, "trust_env": False, "timeout": None}
    if not is_async:
        with openai.OpenAI(http_client=openai.DefaultHttpxClient(**light), **options) as client:
            return agent(client, row)

    async def play() -> Any:
        http = openai.DefaultAsyncHttpxClient(**light)
        async with openai.AsyncOpenAI(http_client=http, **options) as client:
            return await agent(client, row)

    return asyncio.run(play())
