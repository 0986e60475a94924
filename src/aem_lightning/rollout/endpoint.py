"""A model behind an OpenAI-compatible endpoint: a conversation in, a reply out, as text.

The ``openai`` package does the talking, with its own retries: after connections that break, replies
that do not come, 408, 409, 429 and 5xx, with growing pauses or those that the endpoint asks for.
What is left over is told apart here by what it means for a run: nothing can be played any more
(`EndpointError`), one episode cannot go on (`RequestError`, `ContextFullError`), or the run has had
enough (`StoppedError`).
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import httpx2

from aem_lightning.rollout.reply import MalformedReplyError, Message, Reply, read_reply

if TYPE_CHECKING:
    import openai

logger = logging.getLogger(__name__)

MALFORMED_ATTEMPTS = 3
# Failed requests in a row, over all episodes, after which the endpoint counts as broken.
GIVE_UP_AFTER = 8
# How OpenAI, vLLM, SGLang, Mistral, Anthropic, Gemini, TGI, transformers and Cohere put it. What is
# said of max_tokens alone is no full context: every request would be refused, in silence.
_CONTEXT_FULL = re.compile(
    r"context.{0,20}(length|window|size)|(prompt|input).{0,20}too (long|large)"
    r"|(prompt|input).{0,20}tokens?.{0,40}(exceed|must be)|length is longer than.{0,30}maximum"
    r"|too many tokens|reduce the length|range of input length",
    re.I,
)
_TOO_LONG = (400, 413, 422)  # statuses that come with it
_FILTERED = re.compile(r"content.(filter|policy)", re.I)


class EndpointError(RuntimeError):
    """The endpoint cannot be played with; the message says why and what to type."""


class RequestError(RuntimeError):
    """A request that the endpoint does not answer: the episode ends, others go on."""


class ContextFullError(RequestError):
    """A conversation that has outgrown the model's context."""


class StoppedError(RuntimeError):
    """No request is sent any more: the token budget is spent, or the run ends."""


class RateLimitError(RequestError, EndpointError):
    """No reply for want of a rate: the episode ends, and with it a run that has no other."""


class _FilteredError(RuntimeError):
    """A conversation that the endpoint's filter keeps from the model."""


class Client(httpx2.Client):
    """Counts what goes wrong on the way, with the attempts that the ``openai`` package repeats.

    Attributes:
        counts: Where each thread counts: ``counts.here``.
    """

    def __init__(self) -> None:
        # A request carries its own timeout; as many connections as there are episodes.
        super().__init__(limits=httpx2.Limits(max_connections=None), follow_redirects=True)
        self.counts = threading.local()

    def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        try:
            response = super().send(request, **options)
        except httpx2.TransportError as error:
            self._count("timeout" if isinstance(error, httpx2.TimeoutException) else "dropped")
            raise
        if response.status_code == 429:
            self._count("rate_limited")
        elif response.status_code >= 500:
            self._count("server_error")
        return response

    def _count(self, kind: str) -> None:
        getattr(self.counts, "here", Counter())[kind] += 1


class Endpoint:
    """A model behind an OpenAI-compatible endpoint; many threads may ask it at once.

    Args:
        model: The endpoint's name of the model.
        base_url: Where ``/chat/completions`` is, e.g. ``http://127.0.0.1:8000/v1``.
        api_key_env: The environment variable that holds the key; the key itself stays out of every
            log, message and file.
        timeout_s: Patience with one reply.
        max_retries: Further attempts at a request that may yet succeed.
        token_budget: Tokens of prompts and replies that may be used; ``None`` is no limit. What is
            under way when it is spent is still answered.
        request: Further fields of each request; ``None`` takes one of ours away.

    Attributes:
        spent: Tokens used so far.

    Raises:
        ImportError: The ``openai`` package is not installed.
        ValueError: Every argument that cannot be, with what to type.
    """

    def __init__(
        self,
        model: str | None,
        base_url: str,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        timeout_s: float = 120.0,
        max_retries: int = 6,
        token_budget: int | None = None,
        request: Mapping[str, Any] | None = None,
    ) -> None:
        _check(model, base_url, api_key_env, timeout_s, max_retries, token_budget)
        self.model, self.base_url, self.api_key_env = str(model), base_url, api_key_env
        self.timeout_s, self.max_retries = timeout_s, max_retries
        self.token_budget, self.request = token_budget, dict(request or {})
        self.spent = 0
        self._key = os.environ.get(api_key_env, "")
        self._http = Client()
        self._client = _client(self._key, base_url, timeout_s, max_retries, self._http)
        self._lock = threading.Lock()
        self._failures = 0
        self._is_stopped = False

    def check(self) -> None:
        """Raise unless something answers: a wrong address shows at once, not after all retries.

        Raises:
            EndpointError: Nothing answers.
        """
        import openai

        try:
            self._client.with_options(max_retries=0, timeout=10.0).models.list()
            return
        except openai.APITimeoutError:
            return  # a slow one: the first request shows
        except openai.APIConnectionError as error:
            unreachable = self._explained(error)
        except (openai.OpenAIError, ValueError):
            return  # somebody is there; how they speak the protocol shows with the first request
        raise unreachable  # outside, as in `_post`

    def reply(
        self,
        messages: Sequence[Message],
        *,
        max_new_tokens: int,
        temperature: float | None,
        handled: Counter[str] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Reply:
        """The model's answer to a conversation.

        Args:
            messages: The conversation.
            max_new_tokens: Longest reply.
            temperature: Of the sampling; ``None`` leaves it to the endpoint.
            handled: Where what was out of the ordinary is counted, by kind, on the way as well.
            tools: What the model may call; with them, a reply that only calls is an ordinary one.

        Raises:
            ContextFullError: The conversation is too long for the model.
            RequestError: This request is refused, or found no answer after all attempts.
            EndpointError: No request will be answered.
            StoppedError: The budget is spent, or `stop` was called.
        """
        fields = {"max_tokens": max_new_tokens, "temperature": temperature, "tools": tools}
        fields |= self.request
        body = {name: value for name, value in fields.items() if value is not None}
        handled = self._http.counts.here = Counter() if handled is None else handled
        problem = ""
        for _ in range(MALFORMED_ATTEMPTS):
            try:
                reply = read_reply(self._post(messages, body), messages)
            except MalformedReplyError as error:
                problem = str(error)
                handled["malformed"] += 1
                continue
            except _FilteredError:
                reply = Reply("", "stop", 0, 0, kind="refusal")
            except ContextFullError:
                handled["context_full"] += 1
                raise
            if tools and reply.kind == "tool_call":
                reply = replace(reply, kind=None)
            if reply.kind is not None:
                handled[reply.kind] += 1
            with self._lock:
                self._failures = 0
                self.spent += reply.tokens
            return reply
        raise self._failed(f"{MALFORMED_ATTEMPTS} answers were no chat completions: {problem}")

    def check_open(self) -> None:
        """Raise unless requests may be sent.

        Raises:
            StoppedError: The budget is spent, or `stop` was called.
        """
        if self._is_stopped:
            raise StoppedError("the run ends")
        if self.token_budget is not None and self.spent >= self.token_budget:
            raise StoppedError(f"token_budget={self.token_budget} is spent")

    def stop(self) -> None:
        """Send no more requests."""
        self._is_stopped = True

    def close(self) -> None:
        """Send no more requests, and close the connections."""
        self.stop()
        self._client.close()

    def _post(self, messages: Sequence[Message], body: Mapping[str, Any]) -> str:
        """The text of the endpoint's answer."""
        import openai

        self.check_open()
        chat = self._client.chat.completions.with_raw_response
        try:
            answer = chat.create(
                model=self.model, messages=cast(Any, list(messages)), extra_body=dict(body)
            )
            return str(answer.http_response.text)
        except openai.APIError as error:
            explained = self._explained(error)
        raise explained  # outside: what the endpoint echoes, such as the key, joins no traceback

    def _explained(self, error: openai.APIError) -> Exception:
        """What ``error`` means for the run, without the key."""
        import openai

        said = self._without_key(error.message)[:500]
        attempts = f"after {self.max_retries + 1} attempts"
        if isinstance(error, openai.APITimeoutError):
            return self._failed(
                f"no reply within {self.timeout_s:g} s, {attempts}; type a larger timeout_s=..."
            )
        if isinstance(error, openai.APIConnectionError):
            cause = self._without_key(str(error.__cause__ or said))[:500]
            if not isinstance(error.__cause__, httpx2.ConnectError):
                return self._failed(f"the connection broke, {attempts}: {cause}")
            return EndpointError(
                f"Nothing answers at base_url={self.base_url} ({cause}). Is the server up? Type "
                "base_url=http://host:port/v1, where /chat/completions is below it."
            )
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            state = "the key in it is refused" if self._key else "that variable is not set"
            return EndpointError(
                f"The endpoint answered {error.status_code} to the key of "
                f"api_key_env={self.api_key_env} ({state}): {said}\nType: "
                f"export {self.api_key_env}=..., or "
                "api_key_env=<the variable that holds this endpoint's key>."
            )
        if isinstance(error, openai.NotFoundError):
            return EndpointError(
                f"{self.base_url} does not know model={self.model}, or has no /chat/completions "
                f"below it: {said}\nType model=<a name that it serves>, or another base_url=..."
            )
        if isinstance(error, openai.RateLimitError):
            return self._failed(
                f"The endpoint's rate limit holds {attempts}: {said}\nType a smaller "
                "concurrency=..., a larger max_retries=..., or come back later.",
                RateLimitError,
            )
        about = f"{(error.code or '').replace('_', ' ')} {error.message}"
        if getattr(error, "status_code", None) in _TOO_LONG:
            if _FILTERED.search(error.code or ""):
                return _FilteredError()
            if _CONTEXT_FULL.search(about):
                return ContextFullError(said)
        return self._failed(said)

    def _failed(self, reason: str, kind: type[RequestError] = RequestError) -> Exception:
        """One more failure: of the request, or, after many in a row, of the endpoint."""
        with self._lock:
            self._failures += 1
            is_broken = self._failures >= GIVE_UP_AFTER
        if is_broken:
            return EndpointError(
                f"{self._failures} requests in a row failed at {self.base_url}, the last: {reason}"
            )
        return kind(reason)

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _check(
    model: str | None,
    base_url: str,
    api_key_env: str,
    timeout_s: float,
    max_retries: int,
    token_budget: int | None,
) -> None:
    problems = []
    if not model:
        problems.append("model=null: type model=<the endpoint's name of it>")
    if not _is_plain_url(base_url):
        # Not repeated: a password would then stand in the log.
        problems.append(
            "base_url: allowed is http(s)://host[:port]/path without user, password or query, e.g. "
            "base_url=http://127.0.0.1:8000/v1; the key comes from api_key_env"
        )
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", api_key_env):
        problems.append(
            "api_key_env: allowed is the name of an environment variable, e.g. "
            "api_key_env=OPENAI_API_KEY; the key itself does not belong on a command line"
        )
    if not timeout_s > 0:
        problems.append(f"timeout_s={timeout_s}: a number > 0, e.g. timeout_s=120")
    if max_retries < 0:
        problems.append(f"max_retries={max_retries}: a whole number >= 0, e.g. max_retries=6")
    if token_budget is not None and token_budget < 1:
        problems.append(f"token_budget={token_budget}: null, or a whole number >= 1")
    if problems:
        raise ValueError("The endpoint's options have problems:\n  - " + "\n  - ".join(problems))


def _is_plain_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    is_bare = not (parts.username or parts.password or parts.query or parts.fragment)
    return parts.scheme in ("http", "https") and bool(parts.hostname) and is_bare


def _client(
    key: str, base_url: str, timeout_s: float, max_retries: int, http: httpx2.Client
) -> openai.OpenAI:
    try:
        import openai
    except ImportError:
        raise ImportError(
            "policy=api needs the openai package: pip install 'aem-lightning[api]'"
        ) from None
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line for every request
    # Servers without keys take any; the package insists on one.
    return openai.OpenAI(
        api_key=key or "none",
        base_url=base_url,
        timeout=timeout_s,
        max_retries=max_retries,
        http_client=http,
    )
