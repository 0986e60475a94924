"""One vLLM server, over HTTP: what it needs, whether it fits, adapters in, token ids in and out.

Written against vLLM 0.32, and what 0.12 and later document. Errors carry the server's own words and
the command that starts a server that fits.
"""

from __future__ import annotations

import json
import logging
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import torch

from aem_lightning.rollout.engine import Request, Result, Sampling

logger = logging.getLogger(__name__)
logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line for every request

OLDEST = (0, 12)  # structured_outputs; return_token_ids came with 0.10.2
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes
CONNECT_S = 10.0
BATCHED_TOKENS = 8192  # vLLM's own default on small GPUs
RAW_LOGPROBS = 0.01  # nats by which scaled differences may miss


class VllmError(RuntimeError):
    """The vLLM server is not there, or refuses what it was asked."""


class LostServerError(VllmError):
    """A server that answers no more."""


@dataclass(frozen=True)
class Needs:
    """What a run needs of its servers.

    Attributes:
        model: The base model, by the name that it is served under; ``None`` where that is unknown.
        lora_rank: The adapters' rank.
        max_context: Tokens of the longest prompt with its response; ``None`` where unknown.
        dtype: In which the policy's frozen weights are kept; ``None`` and ``auto`` leave it to the
            server, whose machine may be another.
    """

    model: str | None
    lora_rank: int
    max_context: int | None = None
    dtype: str | None = None

    @property
    def served_rank(self) -> int:
        """The least rank that vLLM takes and the adapters fit into."""
        return next((rank for rank in RANKS if rank >= self.lora_rank), RANKS[-1])

    def serve_command(self, port: int, *, on_cpu: bool) -> str:
        """What starts a server that fits.

        Args:
            port: Where it listens.
            on_cpu: A CPU build cannot draw with a seed from a prompt that it computes in parts.
        """
        options = [
            f"--port {port} --enable-lora --max-lora-rank {self.served_rank} --max-loras 2",
            "--logprobs-mode processed_logprobs --generation-config vllm",
            "--enable-prompt-tokens-details",
        ]
        if self.max_context is not None:
            options.append(f"--max-model-len {self.max_context}")
        if self.dtype is not None:
            options.append(f"--dtype {self.dtype}")
        if on_cpu:
            most = max(BATCHED_TOKENS, self.max_context or 0)
            options.append(f"--no-enable-chunked-prefill --max-num-batched-tokens {most}")
        model = shlex.quote(self.model) if self.model else "<model>"
        return " ".join(["VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve", model, *options])


class VllmServer:
    """One server.

    Args:
        url: ``http://host:port``.
        needs: What the run needs of it.
        timeout_s: Patience with one response.

    Raises:
        ValueError: Another kind of URL.
    """

    def __init__(self, url: str, needs: Needs, timeout_s: float) -> None:
        parts = urlsplit(url)
        is_plain = parts.path in ("", "/") and not (parts.query or parts.username)
        if parts.scheme != "http" or not parts.hostname or not is_plain:
            shown = re.sub(r"//.*@", "//***@", url)  # a password would stand in the log
            raise ValueError(
                f"engine.url={shown!r}: allowed is http://host:port of a vLLM server, and no path"
            )
        self.url, self.needs, self.timeout_s = url.rstrip("/"), needs, timeout_s
        self.port = parts.port or 80
        self.version = ""
        self._said = ""
        self._client: httpx2.AsyncClient | None = None

    def serve_command(self) -> str:
        """What starts a server that fits, in this one's place."""
        # A CPU build does not always say so; where no GPU is here, the server may have none either.
        on_cpu = "cpu" in self.version or not torch.cuda.is_available()
        return self.needs.serve_command(self.port, on_cpu=on_cpu)

    async def load(self, name: str, folder: Path) -> None:
        """Load the adapter in ``folder`` under ``name``."""
        await self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})

    async def unload(self, name: str) -> None:
        """Forget an adapter."""
        await self._post("/v1/unload_lora_adapter", {"lora_name": name})

    async def complete(self, body: Mapping[str, Any]) -> str:
        """The answer to a `completion_request`."""
        return await self._post("/v1/completions", body)

    async def check(self, folder: Path) -> None:
        """Raise unless the server can do all that the run needs.

        Args:
            folder: An empty folder where adapters are handed over.

        Raises:
            VllmError: Every reason why not, and what to type.
        """
        said = await self._send("GET", "/version")
        version = _field(said.text, "version") if said.status_code == 200 else None
        if version is None:
            logger.warning("%s does not say which vLLM it is: it is not checked", self.url)
            return
        self.version = version
        if numbers(version) < OLDEST:
            needed = ".".join(map(str, OLDEST))
            raise self._unfit([f"it is vLLM {version}, and {needed} or later is needed"])
        served, problems = await self._served()
        problems += await self._lora_problems(folder)
        if served is not None:
            problems += await self._sampling_problems(served)
        if problems:
            raise self._unfit(problems)

    async def _served(self) -> tuple[str | None, list[str]]:
        """The name of the base model that is served, and what is wrong with it."""
        listed = await self._send("GET", "/v1/models")
        entries = _field(listed.text, "data") if listed.status_code == 200 else None
        bases = {e["id"]: e.get("max_model_len") for e in entries or () if not e.get("parent")}
        if not bases:
            return None, [f"it lists no model: {listed.text.strip()[:200]}"]
        needs = self.needs
        if needs.model is not None and needs.model not in bases:
            return None, [
                f"it serves {', '.join(bases)}, and the run needs {needs.model} (or type "
                f"engine.model={next(iter(bases))}, where that is the same model)"
            ]
        name = needs.model or next(iter(bases))
        longest, wanted = bases[name], needs.max_context
        if wanted is not None and longest is not None and longest < wanted:
            return name, [f"its max_model_len={longest} is less than max_context={wanted}"]
        return name, []

    async def _lora_problems(self, folder: Path) -> list[str]:
        """Whether adapters of the run's rank may be loaded; asked with one that has no weights."""
        config = {"peft_type": "LORA", "r": self.needs.lora_rank, "lora_alpha": 1}
        config["target_modules"] = ["q_proj"]
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(config), encoding="utf-8")
        file.chmod(0o644)
        body = {"lora_name": folder.name, "lora_path": str(folder)}
        answer = await self._send("POST", "/v1/load_lora_adapter", body)
        said = answer.text.strip()[:500]
        if "contain tensors" in said:  # it got as far as it could
            return []
        if "Not Found" in said and "dapter" not in said:
            return ["it was started without VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"]
        if answer.status_code == 404:
            return [
                f"it cannot read {folder.parent}: type engine.adapter_dir=<a folder that it can "
                f"read>; it says: {said}"
            ]
        return [f"it loads no adapter of rank {self.needs.lora_rank}: {said}"]

    async def _sampling_problems(self, served: str) -> list[str]:
        """Whether responses come with ids, the right log-probabilities, and a count of prefixes."""
        gaps: list[float] = []
        top: dict[str, float] = {}
        for temperature in (1.0, 0.5):
            one = Request("check", [1, 2, 3], Sampling(temperature, 1), seed=0)
            body = {**completion_request(one, served), "logprobs": 5}
            text = await self.complete(body)
            completion_result(one, text, 0)
            found = json.loads(text)["choices"][0]["logprobs"].get("top_logprobs") or [{}]
            best = sorted(top or found[0], key=(top or found[0]).__getitem__)[-2:]
            top = top or found[0]
            if len(best) == 2 and all(token in found[0] for token in best):
                gaps.append(found[0][best[1]] - found[0][best[0]])
        problems = []
        if len(gaps) == 2 and abs(gaps[1] - 2 * gaps[0]) > RAW_LOGPROBS * (1 + gaps[0]):
            problems.append("its log-probabilities are not those at the sampling temperature")
        if (_field(text, "usage") or {}).get("prompt_tokens_details") is None:
            problems.append("it does not say how much of a prompt it found in its prefix cache")
        return problems

    def _unfit(self, problems: list[str]) -> VllmError:
        reasons = "\n  - ".join([f"The vLLM server at {self.url} does not fit:", *problems])
        return VllmError(f"{reasons}\nStart it so:\n  {self.serve_command()}")

    async def _post(self, path: str, body: Mapping[str, Any]) -> str:
        """The text of the server's answer.

        Raises:
            LostServerError: It answers no more.
            VllmError: It refuses; with its own words.
        """
        answer = await self._send("POST", path, body)
        if answer.status_code == 200:
            return answer.text
        self._said = f"{answer.status_code}: {answer.text.strip()[:500]}"
        # A core that has died lets the requests under way fail, and the server end after them.
        if answer.status_code >= 500 and (await self._send("GET", "/health")).status_code == 503:
            raise self._lost(path, "its engine is dead")
        hint = "\nAdapters are loaded at run time only by a server that was started so:\n  "
        hint = hint + self.serve_command() if "lora_adapter" in path else ""
        raise VllmError(
            f"The vLLM server at {self.url} answered {answer.status_code} to {path}: "
            f"{answer.text.strip()[:500]}{hint}"
        )

    async def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> httpx2.Response:
        """The server's answer, whatever it is."""
        if self._client is None:  # in the loop that it is used in
            self._client = httpx2.AsyncClient(
                base_url=self.url,
                timeout=httpx2.Timeout(self.timeout_s, connect=CONNECT_S, pool=None),
                limits=httpx2.Limits(max_connections=None),
                trust_env=False,  # a server of one's own is behind no proxy
            )
        for attempt in range(2):
            try:
                return await self._client.request(method, path, json=body)
            except (httpx2.ReadError, httpx2.WriteError, httpx2.RemoteProtocolError) as error:
                # An idle connection may have been closed by the server: once more, on a new one.
                if attempt:
                    raise self._lost(path, f"{type(error).__name__}: {error}") from error
            except httpx2.TransportError as error:
                raise self._lost(path, f"{type(error).__name__}: {error}") from error
        raise AssertionError("both attempts return or raise")

    def _lost(self, path: str, why: str) -> LostServerError:
        said = f"\n  its last words: {self._said}" if self._said else ""
        return LostServerError(
            f"No vLLM server answered at {self.url}{path} ({why}).{said}\n"
            f"  start one:      {self.serve_command()}\n"
            "  and go on:      ckpt_path=last\n"
            "  or another URL: engine.url=http://host:port\n"
            "  or without it:  engine=hf"
        )


def numbers(version: str) -> tuple[int, ...]:
    """The release that a version is of, for comparisons.

    A build from a source without its tags calls itself 0.1.dev: it counts as the newest.

    Example:
        >>> numbers("0.32.0rc1+cpu")
        (0, 32, 0)
        >>> numbers("0.1.dev9+g1a2b3c") > numbers("0.32.0")
        True
    """
    found = re.match(r"v?(\d+(?:\.\d+)*)", version)
    release = tuple(map(int, found[1].split("."))) if found else ()
    is_nameless = not any(release) or (release < (0, 2) and "dev" in version)
    return (sys.maxsize,) if is_nameless else release


def _field(text: str, name: str) -> Any:
    """A field of a JSON object; ``None`` where there is none."""
    try:
        answer = json.loads(text)
    except ValueError:
        return None
    return answer.get(name) if isinstance(answer, dict) else None


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
        # Some servers spell the ids out in place of the tokens' texts alone.
        spelt = (choice.get("logprobs") or {}).get("tokens") or []
        tokens = [int(t.removeprefix("token_id:")) for t in spelt if t.startswith("token_id:")]
    if not tokens or len(tokens) != len(logprobs) or None in logprobs:
        raise VllmError(
            f"{request.key}: the vLLM server gave {len(tokens)} token ids and {len(logprobs)} "
            "log-probabilities; both are needed for every token. Use vLLM "
            f"{'.'.join(map(str, OLDEST))} or later."
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
