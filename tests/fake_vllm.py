"""A stand-in for vLLM's server: the part that the engine uses, in the words of release 0.32."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fake_endpoint import Answer, Answering, running

BASE = "base"


class FakeVllm(ThreadingHTTPServer):
    """The server; ``seen`` keeps what the engine asks for, without what it tries at the start."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.names: set[str] = set()
        self.loaded: dict[str, Path] = {}
        self.version: str | None = "0.32.0"
        self.served, self.max_model_len = BASE, 100
        self.replies: list[list[int]] = []  # whose tokens are answered, by the request's seed
        self.may_load, self.has_lora, self.max_rank = True, True, 64
        self.with_ids, self.with_details, self.raw_logprobs = True, True, False
        self.delay: Callable[[dict[str, Any]], float] = lambda body: 0.0
        self.cannot_read: Path | None = None
        self.is_dead = False  # its engine
        self.hang_ups = 0  # answers that end in their middle

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def completions(self) -> list[dict[str, Any]]:
        return [body for path, body in self.seen if path == "/v1/completions"]


def serving() -> contextlib.AbstractContextManager[FakeVllm]:
    """A running server."""
    return running(FakeVllm())


@contextlib.contextmanager
def several(count: int) -> Iterator[list[FakeVllm]]:
    """Running servers."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(serving()) for _ in range(count)]


def failed(status: int, message: str) -> tuple[int, str]:
    return status, json.dumps({"error": {"message": message, "code": status}})


class _Handler(Answering):
    def do_GET(self) -> None:  # noqa: N802 (http.server's name)
        fake = self.server
        model = {"id": fake.served, "parent": None, "max_model_len": fake.max_model_len}
        status, said = {
            "/version": (200 if fake.version else 404, {"version": fake.version}),
            "/v1/models": (200, {"object": "list", "data": [model]}),
            "/health": (503 if fake.is_dead else 200, {}),
        }[self.path]
        self._send(Answer(json.dumps(said), status))

    def answer(self, body: dict[str, Any]) -> Answer:
        fake, name = self.server, body.get("lora_name", "")
        if not name.startswith("aem-check") and body.get("model") != fake.served:
            fake.seen.append((self.path, body))
        if fake.is_dead:
            return Answer(*reversed(failed(500, "EngineCore encountered an issue.")))
        if fake.hang_ups:
            fake.hang_ups -= 1
            return Answer('{"choices": []}', cut=True)
        status, text = {
            "/v1/load_lora_adapter": self.load,
            "/v1/unload_lora_adapter": self.unload,
            "/v1/completions": self.complete,
        }[self.path](body)
        return Answer(text, status)

    def load(self, body: dict[str, Any]) -> tuple[int, str]:
        fake, name, folder = self.server, body["lora_name"], Path(body["lora_path"])
        if not fake.may_load:
            return 404, '{"detail":"Not Found"}'
        if name in fake.names:
            return failed(400, f"The lora adapter '{name}' has already been loaded.")
        if not fake.has_lora:
            return failed(500, "LoRA is not enabled. Use --enable-lora to enable LoRA.")
        is_there = (folder / "adapter_config.json").is_file()
        if not is_there or folder.parent == fake.cannot_read:
            return failed(404, f"Loading lora {name} failed: No adapter found for {folder}")
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        if rank > fake.max_rank:
            words = f"LoRA rank {rank} is greater than max_lora_rank {fake.max_rank}."
            return failed(500, words)
        if not (folder / "adapter_model.safetensors").is_file():
            return failed(500, f"{folder} doesn't contain tensors")
        fake.names.add(name)
        fake.loaded[name] = folder
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, body: dict[str, Any]) -> tuple[int, str]:
        if self.server.loaded.pop(body["lora_name"], None) is None:
            return failed(404, "The lora adapter cannot be found.")
        return 200, "Success"

    def complete(self, body: dict[str, Any]) -> tuple[int, str]:
        fake = self.server
        if body["model"] not in {fake.served, *fake.loaded}:
            return failed(404, f"The model `{body['model']}` does not exist.")
        if len(body["prompt"]) + body["max_tokens"] > (limit := fake.max_model_len or 100):
            return failed(400, f"This model's maximum context length is {limit} tokens.")
        time.sleep(fake.delay(body))
        count = body["seed"] % body["max_tokens"] + 1
        ids = [8 + (body["seed"] + i) % 5 for i in range(count)]
        if fake.replies:
            ids = list(fake.replies[body["seed"] % len(fake.replies)])
            count = len(ids)
        stops = count < body["max_tokens"]
        if stops:
            ids[-1] = body["stop_token_ids"][0]
        scale = 1.0 if fake.raw_logprobs else body["temperature"]
        choice: dict[str, Any] = {
            "index": 0,
            "text": "x",
            "finish_reason": "stop" if stops else "length",
            "logprobs": {
                "tokens": [f"token_id:{i}" for i in ids],
                "token_logprobs": [-0.25 * i for i in range(count)],
                "top_logprobs": [{"token_id:8": -0.2 / scale, "token_id:9": -1.7 / scale}],
            },
        }
        if fake.with_ids:
            choice["token_ids"] = ids
        usage: dict[str, Any] = {"prompt_tokens": len(body["prompt"])}
        usage["prompt_tokens_details"] = None
        if fake.with_details:
            usage["prompt_tokens_details"] = {"cached_tokens": 3}
        return 200, json.dumps({"choices": [choice], "usage": usage})
