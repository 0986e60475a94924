"""The ``vllm`` engine: responses from a vLLM server, over HTTP, token ids in and token ids out.

The server runs in an environment of its own (vLLM pins its torch exactly) and keeps the base model;
each version of the policy is sent as a LoRA adapter, written to shared memory and loaded under a
new name. The name matters: vLLM keeps prefixes by adapter name, and would go on with the keys and
values of the old weights under a name that it knows. Start it with `serve_command`.

What is different from ``engine=hf``: entropies are not known (the pass for old log-probabilities
brings them), and a draw depends on the server's batching in its last bits, so that two runs may
part. With ``action=constrained`` the server's log-probabilities may be those of what it was allowed
to draw; the old ones, of the policy alone, come from that pass too. Protocol: vLLM 0.12 and later
for constrained actions (``structured_outputs``), 0.10.2 and later for all else
(``return_token_ids``); written against the documentation of 0.26 to 0.32.
"""

from __future__ import annotations

import http.client
import json
import logging
import queue
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aem_lightning.rollout.engine import Request, Result, SyncablePolicy
from aem_lightning.types import Count, Places, Positive

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")


class VllmError(RuntimeError):
    """The vLLM server is not there, or refuses what it was asked."""


class VllmEngine:
    """Responses from a vLLM server; a ``RolloutEngine``.

    Args:
        url: Where the server listens.
        model: The base model, by the name that the server serves it under.
        concurrency: Requests in flight at once; the server does the batching.
        timeout_s: Patience with one response.
        adapter_dir: Where adapters are handed over, a folder that the server can read; by default
            shared memory, where there is such a thing.
        max_lora_rank: What the server has to be started with; part of the help in errors.

    Raises:
        ValueError: A URL that is not ``http://host:port``, or a number out of range.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        model: str | None = None,
        concurrency: Places = 128,
        timeout_s: Positive = 600.0,
        adapter_dir: str | None = None,
        max_lora_rank: Count = 64,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"engine.url={url!r}: allowed is http://host:port of a vLLM server")
        if concurrency < 1 or timeout_s <= 0:
            raise ValueError(
                f"engine.concurrency={concurrency}, engine.timeout_s={timeout_s}: "
                "at least 1 request at once, and more than 0 seconds"
            )
        self.url, self.model, self.timeout_s = url, model, timeout_s
        self.max_lora_rank = max_lora_rank
        self.version = -1
        self._host, self._port = parts.hostname, parts.port or 80
        default = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
        self._adapter_dir = adapter_dir or default
        self._run = f"aem-{uuid.uuid4().hex[:8]}"  # runs may share a server
        self._loaded: tuple[str, Path] | None = None
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="vllm")
        self._local = threading.local()
        self._finished: queue.SimpleQueue[tuple[str, int, Result | Exception]] = queue.SimpleQueue()
        self._under_way: dict[str, int] = {}
        self._orders = 0

    def sync(self, policy: SyncablePolicy, version: int) -> None:
        """Load the policy's present adapters under a new name, and unload the old ones.

        Raises:
            RuntimeError: Requests are unfinished; they would be drawn from two policies.
            TypeError: The policy cannot write its adapters.
            VllmError: The server is not there, or cannot load them.
        """
        if self._under_way:
            raise RuntimeError(
                f"sync to version {version} with {len(self._under_way)} unfinished requests: "
                "call poll(wait_all=True) or close() them first"
            )
        save = getattr(policy, "save_adapter", None)
        if save is None:
            raise TypeError(
                f"engine=vllm needs a policy with save_adapter(folder), not {type(policy).__name__}"
            )
        # Not by mkdtemp, whose folders a server of another account cannot read.
        folder = Path(self._adapter_dir or tempfile.gettempdir(), f"aem-adapter-{uuid.uuid4().hex}")
        folder.mkdir()
        save(folder)
        self._orders += 1
        # A version may come twice (training, then validation): the count makes the name new.
        name = f"{self._run}-v{version}-{self._orders}"
        try:
            self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        except VllmError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._unload()
        self._loaded, self.version = (name, folder), version

    def submit(self, requests: Iterable[Request]) -> None:
        """Send requests; at most one unfinished request a key.

        Raises:
            RuntimeError: ``sync`` was never called.
            ValueError: An empty prompt, or a key with an unfinished request. Nothing of the call is
                sent then.
        """
        if self._loaded is None:
            raise RuntimeError("the engine has no policy yet: call sync(policy, version) first")
        requests = list(requests)
        busy = set(self._under_way)
        for request in requests:
            if request.key in busy:
                raise ValueError(
                    f"{request.key}: submitted again before its last request has finished"
                )
            if not request.prompt:
                raise ValueError(f"{request.key}: the prompt is empty; it needs at least 1 token")
            busy.add(request.key)
        for request in requests:
            self._orders += 1
            self._under_way[request.key] = self._orders
            self._threads.submit(self._draw, request, self._orders, self._loaded[0], self.version)

    def poll(self, wait_all: bool = False, at_least: int = 1) -> list[Result]:
        """Wait until ``at_least`` requests (all with ``wait_all``) have finished; return them.

        Raises:
            VllmError: A request failed.
        """
        results: list[tuple[int, Result]] = []
        while self._under_way and (
            wait_all or len(results) < at_least or not self._finished.empty()
        ):
            key, order, result = self._finished.get()
            if self._under_way.get(key) != order:  # closed meanwhile
                continue
            del self._under_way[key]
            if isinstance(result, Exception):
                raise result
            results.append((order, result))
        return [result for _, result in sorted(results, key=lambda pair: pair[0])]

    def close(self, key: str) -> None:
        """End an episode: what is under way for it will be thrown away."""
        self._under_way.pop(key, None)

    def shutdown(self) -> None:
        """Unload the adapters and end the threads; the server goes on."""
        self._under_way.clear()
        self._unload()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def serve_command(self) -> str:
        """What starts a server that fits."""
        return (
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True "
            f"vllm serve {self.model or '<model>'} --port {self._port} --enable-lora "
            f"--max-lora-rank {self.max_lora_rank} --max-loras 2 "
            "--logprobs-mode processed_logprobs --generation-config vllm"
        )

    def _unload(self) -> None:
        if self._loaded is None:
            return
        name, folder = self._loaded
        self._loaded = None
        self._post("/v1/unload_lora_adapter", {"lora_name": name})
        shutil.rmtree(folder, ignore_errors=True)

    def _draw(self, request: Request, order: int, model: str, version: int) -> None:
        """Ask for one response and queue it, or what went wrong; runs in a thread."""
        answer: Result | Exception
        try:
            body = completion_request(request, model)
            answer = completion_result(request, self._post("/v1/completions", body), version)
        except Exception as error:  # raised where the caller is, by poll
            answer = error
        self._finished.put((request.key, order, answer))

    def _post(self, path: str, body: Mapping[str, Any]) -> str:
        """The text of the server's answer; one connection a thread, opened again where it broke."""
        data = json.dumps(body)
        for attempt in range(2):
            connection = getattr(self._local, "connection", None)
            is_fresh = connection is None
            if connection is None:
                connection = http.client.HTTPConnection(
                    self._host, self._port, timeout=self.timeout_s
                )
                self._local.connection = connection
            try:
                connection.request("POST", path, data, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                text = answer.read().decode(errors="replace")
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                self._local.connection = None
                # An idle connection may have been closed by the server: try once with a new one.
                if is_fresh or attempt or isinstance(error, TimeoutError):
                    raise VllmError(
                        f"No vLLM server answered at {self.url}{path} "
                        f"({type(error).__name__}: {error}).\n"
                        f"  start one:      {self.serve_command()}\n"
                        "  or another URL: engine.url=http://host:port\n"
                        "  or without it:  engine=hf"
                    ) from error
                continue
            if answer.status != 200:
                raise VllmError(self._refused(path, answer.status, text))
            return text
        raise AssertionError("both attempts return or raise")

    def _refused(self, path: str, status: int, text: str) -> str:
        hint = "\nAdapters are loaded at run time only by a server that was started so:\n  "
        hint = hint + self.serve_command() if "lora_adapter" in path else ""
        return f"The vLLM server answered {status} to {path}: {text.strip()[:500]}{hint}"


def completion_request(request: Request, model: str) -> dict[str, Any]:
    """The body for ``/v1/completions``: plain softmax sampling, ids in and ids out."""
    sampling, bound = request.sampling, request.constraint
    return {
        **({"structured_outputs": bound.structured_outputs()} if bound is not None else {}),
        "model": model,
        "prompt": list(request.prompt),
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "seed": request.seed,
        "stop_token_ids": list(sampling.stop_ids),
        "ignore_eos": True,  # our stop ids alone end a response
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "n": 1,
        "logprobs": 0,  # of the sampled token alone
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "skip_special_tokens": False,
        "add_special_tokens": False,
    }


def completion_result(request: Request, text: str, version: int) -> Result:
    """The answer of ``/v1/completions`` as a result.

    Raises:
        VllmError: It has no token ids, or not one log-probability a token.
    """
    answer = json.loads(text)
    choice = answer["choices"][0]
    logprobs = (choice.get("logprobs") or {}).get("token_logprobs") or []
    tokens = choice.get("token_ids")
    if tokens is None:
        # Releases before return_token_ids spell the ids out in place of the tokens' texts.
        spelt = (choice.get("logprobs") or {}).get("tokens") or []
        tokens = [int(t.removeprefix("token_id:")) for t in spelt if t.startswith("token_id:")]
    if not tokens or len(tokens) != len(logprobs) or None in logprobs:
        raise VllmError(
            f"{request.key}: the vLLM server gave {len(tokens)} token ids and {len(logprobs)} "
            "log-probabilities; both are needed for every token. Use vLLM 0.10.2 or later."
        )
    # Prompt tokens that the server found in its prefix cache, where it says so.
    details = (answer.get("usage") or {}).get("prompt_tokens_details") or {}
    return Result(
        key=request.key,
        tokens=list(tokens),
        logprobs=[float(value) for value in logprobs],
        entropies=None,
        finish_reason="stop" if tokens[-1] in request.sampling.stop_ids else "length",
        version=version,
        reused=int(details.get("cached_tokens") or 0),
    )
