"""The vLLM engine against a server that checks the protocol."""

from __future__ import annotations

import json
import socket
import threading
import time
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_endpoint import Answer, Answering, running
from tiny_play import PLAIN, LocalPool, coin_task, make_policy

from aem_lightning.rollout import (
    Collector,
    EngineResponder,
    PromptEncoder,
    Request,
    RewardShaping,
    RolloutEngine,
    Sampling,
    VllmEngine,
    VllmError,
    make_groups,
)

STOP = 7


class Handler(Answering):
    """The part of vLLM's server that the engine uses; ``server.seen`` keeps every request."""

    def answer(self, body):
        self.server.seen.append((self.path, body))
        status, text = {
            "/v1/load_lora_adapter": self.load,
            "/v1/unload_lora_adapter": self.unload,
            "/v1/completions": self.complete,
        }[self.path](body)
        return Answer(text, status)

    def load(self, body):
        name, folder = body["lora_name"], Path(body["lora_path"])
        if not self.server.may_load:
            return 404, '{"detail":"Not Found"}'
        if name in self.server.names:
            return 400, f"The lora adapter '{name}' has already been loaded."
        files = {path.name for path in folder.iterdir()}
        if not {"adapter_config.json", "adapter_model.safetensors"} <= files:
            return 404, f"No adapter found for {folder}"
        self.server.names.add(name)
        self.server.loaded[name] = folder
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, body):
        if self.server.loaded.pop(body["lora_name"], None) is None:
            return 404, "The lora adapter cannot be found."
        return 200, "Success"

    def complete(self, body):
        if body["model"] not in self.server.loaded:
            return 404, json.dumps({"error": {"message": f"no model {body['model']}"}})
        if len(body["prompt"]) + body["max_tokens"] > 100:
            return 400, json.dumps({"error": {"message": "maximum context length is 100"}})
        time.sleep(self.server.delay(body))
        count = body["seed"] % body["max_tokens"] + 1
        ids = [8 + (body["seed"] + i) % 5 for i in range(count)]
        if count < body["max_tokens"]:
            ids[-1] = body["stop_token_ids"][0]
        choice = {
            "index": 0,
            "text": "x",
            "finish_reason": "stop" if count < body["max_tokens"] else "length",
            "logprobs": {
                "tokens": [f"token_id:{i}" for i in ids],
                "token_logprobs": [-0.25 * i for i in range(count)],
            },
        }
        if self.server.with_ids:
            choice["token_ids"] = ids
        usage = {"prompt_tokens_details": {"cached_tokens": 3}}
        return 200, json.dumps({"choices": [choice], "usage": usage})


@pytest.fixture
def server():
    fake = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake.daemon_threads = True
    fake.seen, fake.names, fake.loaded = [], set(), {}
    fake.may_load, fake.with_ids, fake.delay = True, True, lambda body: 0.0
    with running(fake):
        yield fake


@pytest.fixture
def engine(server, tmp_path):
    url = f"http://127.0.0.1:{server.server_port}"
    engine = VllmEngine(url, "base", concurrency=8, timeout_s=10, adapter_dir=str(tmp_path))
    yield engine
    if server.may_load:
        engine.shutdown()


@pytest.fixture(scope="module")
def policy():
    return make_policy()


def request(key, seed, new=6, temperature=1.0, prompt=(1, 2, 3)):
    return Request(key, list(prompt), Sampling(temperature, new, (STOP,)), seed)


def completions(server):
    return [body for path, body in server.seen if path == "/v1/completions"]


def test_it_is_a_rollout_engine(engine):
    assert isinstance(engine, RolloutEngine)


def test_a_request_carries_ids_and_nothing_that_reshapes_the_distribution(server, engine, policy):
    engine.sync(policy, 3)
    engine.submit([request("a", 2, temperature=0.7, prompt=(5, 6))])
    (result,) = engine.poll()
    (body,) = completions(server)
    assert body["prompt"] == [5, 6]
    assert (body["temperature"], body["seed"], body["max_tokens"]) == (0.7, 2, 6)
    assert (body["stop_token_ids"], body["ignore_eos"]) == ([STOP], True)
    neutral = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "n": 1}
    assert {name: body[name] for name in neutral} == neutral
    assert body["return_token_ids"]
    assert body["return_tokens_as_token_ids"]
    assert result.tokens == [10, 11, STOP]
    assert result.logprobs == [0.0, -0.25, -0.5]
    assert result.entropies is None
    assert (result.finish_reason, result.version, result.reused) == ("stop", 3, 3)
    engine.submit([request("a", 5)])
    assert engine.poll()[0].finish_reason == "length"


def test_ids_are_read_from_the_log_probabilities_where_there_is_no_other_place(
    server, engine, policy
):
    server.with_ids = False
    engine.sync(policy, 0)
    engine.submit([request("a", 2)])
    assert engine.poll()[0].tokens == [10, 11, STOP]


def test_every_sync_loads_a_new_name_and_then_unloads_the_old_one(server, engine, policy, tmp_path):
    for version in (0, 1, 1):
        engine.sync(policy, version)
        engine.submit([request("a", 1)])
        engine.poll()
    paths = [path.rpartition("/")[2] for path, _ in server.seen]
    again = ["load_lora_adapter", "unload_lora_adapter", "completions"]
    assert paths == ["load_lora_adapter", "completions", *again, *again]
    assert len(server.names) == 3
    assert [body["model"] for body in completions(server)][-1] in server.loaded
    assert len({body["model"] for body in completions(server)}) == 3
    assert [folder.parent for folder in server.loaded.values()] == [tmp_path]
    engine.shutdown()
    assert not server.loaded
    assert list(tmp_path.iterdir()) == []


def test_poll_returns_what_has_finished_while_others_are_under_way(server, engine, policy):
    gate = threading.Event()
    server.delay = lambda body: gate.wait(10) * 0.0 if body["seed"] == 9 else 0.0
    engine.sync(policy, 0)
    engine.submit([request("slow", 9), request("quick", 1), request("other", 2)])
    assert {result.key for result in engine.poll(at_least=2)} == {"quick", "other"}
    with pytest.raises(RuntimeError, match="1 unfinished"):
        engine.sync(policy, 1)
    with pytest.raises(ValueError, match="slow: submitted again"):
        engine.submit([request("slow", 1)])
    gate.set()
    assert [result.key for result in engine.poll(wait_all=True)] == ["slow"]
    assert engine.poll() == []


def test_a_closed_episode_gives_no_result_even_to_its_next_request(server, engine, policy):
    gate = threading.Event()
    server.delay = lambda body: gate.wait(10) * 0.0 if body["seed"] == 9 else 0.0
    engine.sync(policy, 0)
    engine.submit([request("a", 9)])
    engine.close("a")
    engine.submit([request("a", 1)])
    gate.set()
    (result,) = engine.poll(wait_all=True)
    assert len(result.tokens) == 2
    assert engine.poll() == []


def test_episodes_are_played_through_the_collector(engine, policy):
    engine.sync(policy, 0)
    encoder, pool = PromptEncoder(policy.tokenizer, PLAIN, "transcript"), LocalPool()
    responder = EngineResponder(engine, Sampling(1.0, 4, (STOP,)), ("seed",), share=0.5)
    collector = Collector(pool, encoder, responder, RewardShaping(), 2, 90, 4)
    played = collector.collect(make_groups([coin_task(i) for i in range(2)], 3))
    assert all(len(trajectory.turns) == 2 for trajectory in played)
    assert all(turn.entropies is None for trajectory in played for turn in trajectory.turns)


def test_a_server_that_is_not_there_is_told_with_the_command_that_starts_one(policy, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    engine = VllmEngine(f"http://127.0.0.1:{port}", "some/model", adapter_dir=str(tmp_path))
    with pytest.raises(VllmError) as error:
        engine.sync(policy, 0)
    text = str(error.value)
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve some/model" in text
    assert f"--port {port} --enable-lora --max-lora-rank 64" in text
    assert "engine=hf" in text


def test_a_server_that_may_not_load_adapters_is_told_how_to_be_started(server, engine, policy):
    server.may_load = False
    with pytest.raises(VllmError, match=r"404 to /v1/load_lora_adapter(.|\n)*LORA_UPDATING=True"):
        engine.sync(policy, 0)


def test_a_refused_request_raises_the_servers_own_words(engine, policy):
    engine.sync(policy, 0)
    engine.submit([request("long", 1, prompt=range(99))])
    with pytest.raises(VllmError, match=r"answered 400.*maximum context length is 100"):
        engine.poll()
    assert engine.poll() == []


def test_submitting_before_sync_and_empty_prompts_are_refused(engine, policy):
    with pytest.raises(RuntimeError, match=r"call sync\(policy, version\)"):
        engine.submit([request("a", 1)])
    engine.sync(policy, 0)
    with pytest.raises(ValueError, match="the prompt is empty"):
        engine.submit([request("a", 1, prompt=())])


def test_a_policy_without_adapters_and_a_strange_url_are_refused(engine):
    with pytest.raises(TypeError, match=r"save_adapter\(folder\)"):
        engine.sync(SimpleNamespace(causal_lm=None), 0)
    with pytest.raises(ValueError, match="http://host:port"):
        VllmEngine("localhost:8000")


def test_a_connection_that_the_server_dropped_is_opened_again(server, engine, policy):
    engine.sync(policy, 0)
    engine._local.connection.sock.shutdown(socket.SHUT_RDWR)
    engine.sync(policy, 1)
    assert engine.version == 1
