"""The vLLM engine against a server that checks the protocol."""

from __future__ import annotations

import itertools
import logging
import re
import socket
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from fake_vllm import BASE, serving, several
from runs import toy_config
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
    vllm_engine,
)
from aem_lightning.runner import cli, training
from aem_lightning.runner.build import check_parts
from aem_lightning.runner.checks import ConfigError
from aem_lightning.runner.parts import made

STOP = 7


@pytest.fixture
def server():
    with serving() as fake:
        yield fake


@pytest.fixture
def engine(server, tmp_path):
    engine = make_engine(server, tmp_path)
    yield engine
    engine.shutdown()


def make_engine(server, folder, **changes):
    settings = {"model": BASE, "concurrency": 8, "timeout_s": 10.0, "adapter_dir": str(folder)}
    return VllmEngine(server.url, **{**settings, **changes})


@pytest.fixture(scope="module")
def policy():
    return make_policy()


def request(key, seed, new=6, temperature=1.0, prompt=(1, 2, 3)):
    return Request(key, list(prompt), Sampling(temperature, new, (STOP,)), seed)


def nobody():
    """An address where nobody listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


def test_it_is_a_rollout_engine(engine):
    assert isinstance(engine, RolloutEngine)


def test_a_request_carries_ids_and_nothing_that_reshapes_the_distribution(server, engine, policy):
    engine.sync(policy, 3)
    engine.submit([request("a", 2, temperature=0.7, prompt=(5, 6))])
    (result,) = engine.poll()
    (body,) = server.completions()
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
    assert [body["model"] for body in server.completions()][-1] in server.loaded
    assert len({body["model"] for body in server.completions()}) == 3
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
    away = nobody()
    port = away.rpartition(":")[2]
    engine = VllmEngine(away, "some/model", adapter_dir=str(tmp_path))
    with pytest.raises(VllmError) as error:
        engine.sync(policy, 0)
    text = str(error.value)
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve some/model" in text
    assert f"--port {port} --enable-lora --max-lora-rank 64" in text
    assert "engine=hf" in text


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
    for url in ("localhost:8000", "https://a:1", "http://a:8000/v1", "http://me:pass@a:1"):
        with pytest.raises(ValueError, match="allowed is http://host:port") as error:
            VllmEngine(url)
        assert "pass" not in str(error.value)


@pytest.mark.parametrize(
    ("server_is", "needs", "told"),
    [
        ({"version": "0.9.1"}, {}, r"it is vLLM 0.9.1, and 0.12 or later is needed"),
        ({"version": "0.11.2rc1+cu128"}, {}, r"it is vLLM 0.11.2rc1"),
        ({"may_load": False}, {}, "without VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"),
        ({"has_lora": False}, {}, r"LoRA is not enabled. Use --enable-lora"),
        ({"max_rank": 8}, {"max_lora_rank": 9}, "LoRA rank 9 is greater than max_lora_rank 8"),
        ({"served": "other/model"}, {}, r"serves other/model, and the run needs base"),
        ({"max_model_len": 99}, {"max_context": 100}, r"max_model_len=99 .* max_context=100"),
        ({"with_details": False}, {}, "how much of a prompt it found in its prefix cache"),
        ({"raw_logprobs": True}, {}, "not those at the sampling temperature"),
    ],
)
def test_a_server_that_does_not_fit_is_told_at_the_start_with_the_command(
    server, tmp_path, server_is, needs, told
):
    for name, value in server_is.items():
        setattr(server, name, value)
    with pytest.raises(VllmError) as error:
        make_engine(server, tmp_path, **needs).check_server()
    text = str(error.value)
    assert re.search(told, text), text
    assert f"The vLLM server at {server.url} does not fit" in text
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve base --port" in text
    assert "--logprobs-mode processed_logprobs" in text
    assert "--enable-prompt-tokens-details" in text
    assert not list(tmp_path.iterdir())


def test_all_that_is_wrong_with_a_server_is_told_at_once_and_before_a_policy_is_sent(
    server, policy, tmp_path
):
    server.served, server.may_load = "other", False
    engine = make_engine(server, tmp_path)
    with pytest.raises(VllmError, match=r"serves other(.|\n)*RUNTIME_LORA_UPDATING=True\n"):
        engine.sync(policy, 0)
    assert not server.seen


def test_a_server_that_cannot_read_the_folder_is_told_to_be_given_another(server, tmp_path):
    engine = make_engine(server, tmp_path)
    server.cannot_read = tmp_path
    with pytest.raises(VllmError, match=r"cannot read .*engine\.adapter_dir=.*No adapter found"):
        engine.check_server()


@pytest.mark.parametrize(("rank", "served"), [(1, 1), (4, 8), (16, 16), (48, 64), (300, 320)])
def test_the_command_names_a_rank_that_vllm_takes(rank, served):
    command = VllmEngine(model="m", max_lora_rank=rank, max_context=9000).serve_command()
    assert f"--max-lora-rank {served} " in command
    assert "--max-model-len 9000" in command
    with pytest.raises(ValueError, match=r"max_lora_rank=513(.|\n)*policy.lora.r=512"):
        VllmEngine(max_lora_rank=513)


def test_a_cpu_build_is_started_so_that_a_seeded_prompt_is_computed_whole(
    server, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    engine = make_engine(server, tmp_path, max_context=100)
    engine.check_server()
    assert "chunked" not in engine.serve_command()
    server.version = "0.32.0+cpu"
    engine.check_server()
    assert "--no-enable-chunked-prefill --max-num-batched-tokens 8192" in engine.serve_command()


def test_a_server_that_hides_its_version_is_not_checked(server, policy, tmp_path, caplog):
    server.version = None
    engine = make_engine(server, tmp_path)
    engine.sync(policy, 0)
    assert "does not say which vLLM it is" in caplog.text
    engine.shutdown()


def test_a_connection_that_the_server_dropped_is_opened_again(server, engine, policy):
    engine.sync(policy, 0)
    server.hang_ups = 1
    engine.submit([request("a", 2)])
    assert engine.poll()[0].tokens == [10, 11, STOP]
    assert [body["seed"] for body in server.completions()] == [2, 2]


def test_a_dead_engine_ends_with_the_servers_last_words(server, policy, tmp_path):
    engine = make_engine(server, tmp_path)
    engine.sync(policy, 0)
    server.is_dead = True
    engine.submit([request("a", 2)])
    with pytest.raises(VllmError) as error:
        engine.poll()
    for words in ("its engine is dead", "EngineCore encountered an issue", "ckpt_path=last"):
        assert words in str(error.value)


def test_several_servers_share_the_episodes_and_each_stays_with_its_own(policy, tmp_path):
    with several(3) as servers:
        engine = make_engine(servers[0], tmp_path, urls=[fake.url for fake in servers])
        engine.sync(policy, 0)
        assert [len(fake.loaded) for fake in servers] == [1, 1, 1]
        assert len(set().union(*(fake.loaded for fake in servers))) == 1, "one name for all"
        for turn in range(3):
            engine.submit(request(f"e{i}", turn, prompt=(i + 1,)) for i in range(6))
            engine.poll(wait_all=True)
        episodes = [sorted(body["prompt"][0] for body in fake.completions()) for fake in servers]
        assert [len(set(found)) for found in episodes] == [2, 2, 2]
        assert sorted(itertools.chain(*episodes)) == sorted([*range(1, 7)] * 3)
        engine.sync(policy, 1)
        engine.shutdown()
        assert not any(fake.loaded for fake in servers)


def test_a_lost_server_is_left_out_and_what_it_owes_is_asked_of_the_others(
    policy, tmp_path, caplog
):
    with several(3) as servers:
        engine = make_engine(servers[0], tmp_path, urls=[fake.url for fake in servers])
        engine.sync(policy, 0)
        servers[0].is_dead = True
        servers[1].hang_ups = 100
        engine.submit(request(f"e{i}", 10 + i) for i in range(9))
        results = engine.poll(wait_all=True)
        assert [result.key for result in results] == [f"e{i}" for i in range(9)]
        seeds = {body["seed"] for body in servers[2].completions()}
        assert seeds == set(range(10, 19)), "asked with the same seeds"
        warned = [r for r in caplog.records if r.levelno == logging.WARNING]
        assert len(warned) == 2, "one a server"
        engine.sync(policy, 1)
        assert len(servers[2].loaded) == 1
        servers[2].is_dead = True
        engine.submit([request("last", 1)])
        with pytest.raises(VllmError) as error:
            engine.poll()
        assert all(fake.url in str(error.value) for fake in servers)
        engine.shutdown()


def test_a_server_that_was_never_there_is_left_out_at_the_start(policy, server, tmp_path, caplog):
    away = nobody()
    engine = make_engine(server, tmp_path, urls=[away, server.url])
    engine.sync(policy, 0)
    assert f"1 of 2 servers go on: No vLLM server answered at {away}" in caplog.text
    assert len(server.loaded) == 1
    engine.shutdown()


@pytest.mark.parametrize("urls", [[], ["http://a:1", "http://a:1/"], ["http://a:1", "b:2"]])
def test_urls_that_cannot_be_are_refused(urls):
    with pytest.raises(ValueError, match=r"engine\.url"):
        VllmEngine(urls=urls)


class Ranks:
    """Two ranks in one process: what one broadcasts, the other receives."""

    def __init__(self, monkeypatch):
        self.rank, self.sent, self.barriers = 0, [], 0
        for name, value in {
            "is_initialized": lambda: True,
            "get_world_size": lambda: 2,
            "get_rank": lambda: self.rank,
            "broadcast_object_list": self.broadcast,
            "barrier": self.barrier,
        }.items():
            monkeypatch.setattr(dist, name, value)

    def broadcast(self, objects, src):
        if self.rank == src:
            self.sent = list(objects)
        else:
            objects[:] = self.sent

    def barrier(self):
        self.barriers += 1


@pytest.mark.parametrize(
    ("servers", "ranks", "shares"),
    [
        ("abcd", 1, ["abcd"]),
        ("abcd", 2, ["ab", "cd"]),
        ("ab", 4, ["a", "a", "b", "b"]),
        ("abc", 2, ["a", "bc"]),
        ("abc", 8, ["a", "a", "a", "b", "b", "b", "c", "c"]),
    ],
)
def test_a_server_is_asked_by_no_rank_or_by_many_more_than_others(
    servers, ranks, shares, monkeypatch
):
    found = []
    for rank in range(ranks):
        said = {"number_of_ranks": ranks, "this_rank": rank}
        for name, value in said.items():
            monkeypatch.setattr(vllm_engine, name, lambda value=value: value)
        found.append("".join(vllm_engine.own_share(list(servers))))
    assert found == shares


def test_ranks_load_an_adapter_once_and_share_its_name(server, policy, tmp_path, monkeypatch):
    ranks = Ranks(monkeypatch)
    engines = [make_engine(server, tmp_path) for _ in range(2)]
    for version in range(2):
        for ranks.rank, engine in enumerate(engines):
            engine.sync(policy, version)
    for ranks.rank, engine in enumerate(engines):
        engine.submit([request("a", 2)])
        engine.poll()
    assert ranks.barriers == 4
    for ranks.rank, engine in reversed(list(enumerate(engines))):
        engine.shutdown()
    paths = [path.rpartition("/")[2] for path, _ in server.seen]
    load, unload = "load_lora_adapter", "unload_lora_adapter"
    assert paths == [load, load, unload, "completions", "completions", unload]
    assert len({body["model"] for body in server.completions()}) == 1
    assert not list(tmp_path.iterdir())


def test_ranks_hear_why_the_first_could_not_load(server, policy, tmp_path, monkeypatch):
    ranks = Ranks(monkeypatch)
    server.has_lora = False
    for ranks.rank in range(2):
        with pytest.raises(VllmError, match="LoRA is not enabled"):
            make_engine(server, tmp_path).sync(policy, 0)


def test_a_run_without_its_server_ends_in_a_clear_message_before_games_are_made(
    tmp_path, monkeypatch
):
    def made_too_early(cfg):
        raise AssertionError("games are made before the server is asked")

    monkeypatch.setattr(training, "build_datamodule", made_too_early)
    away = nobody()
    words = ["engine=vllm", f"engine.url={away}", "policy.model=some/model"]
    cfg = toy_config(tmp_path, None, *words)
    with pytest.raises(VllmError, match=f"No vLLM server answered at {away}") as error:
        training.train(cfg)
    told = cli._mendable(error.value)
    assert "vllm serve some/model --port" in told
    assert f"--max-model-len {cfg.max_context} --dtype float32" in told


def test_the_option_takes_several_addresses_and_refuses_one_that_is_no_list(tmp_path):
    both = "engine.urls=[http://a:8000,http://b:8000]"
    engine = made("engine", toy_config(tmp_path, None, "engine=vllm", both).engine)
    assert [server.url for server in engine.servers] == ["http://a:8000", "http://b:8000"]
    with pytest.raises(ConfigError, match=r"engine\.urls"):
        check_parts(toy_config(tmp_path, None, "engine=vllm", "engine.urls=http://a:8000"))
