"""Training and evaluation through real servers on this machine's CPU, by ``make test-vllm``."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from runs import Keep, built, composed, fit

from aem_lightning.modules import AgentModule
from aem_lightning.rollout import (
    ContextFullError,
    Endpoint,
    Result,
    VllmEngine,
    VllmError,
    make_groups,
)
from aem_lightning.runner import evaluate, train
from servers.real import THRIFT, Server, keep

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(3600),
    pytest.mark.skipif("VLLM_VENV" not in os.environ, reason="type: make test-vllm"),
]

PORT, RANK, CONTEXT = 8123, 8, 768
TRAINED, GOES_ON = 3, 4  # iterations before the kill, and in all
# Long enough for whole blocks of the prefix cache, which on a CPU are of 128 tokens.
RULES = " ".join(f"Rule {i}: write plain words, one line, no list, no title." for i in range(10))
ROUNDS = 3  # of a measurement, one engine after the other: the machine may be shared
GAP = 1e-3  # nats between the server's float32 and ours


@pytest.fixture(scope="module")
def model() -> str:
    return os.environ["SMOLLM2"]


@pytest.fixture(scope="module")
def make_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Starts a server by a command, on a port of its own."""
    logs, ports, running = tmp_path_factory.mktemp("logs"), count(PORT), []

    def make(command: Callable[[int], str], name: str) -> Server:
        port = next(ports)
        venv = Path(os.environ["VLLM_VENV"])
        server = Server(command(port), port, venv, logs / f"{name}.log")
        running.append(server)
        keep(**{f"{name} was up after, s": round(server.start(), 1)})
        return server

    yield make
    for server in running:
        server.kill()


@pytest.fixture(scope="module")
def vllm(model: str, make_server: Callable[..., Server]) -> Server:
    """A server that was started by the command that we print."""

    def command(port: int) -> str:
        needs = {"model": model, "max_lora_rank": RANK, "max_context": CONTEXT, "dtype": "float32"}
        engine = VllmEngine(f"http://127.0.0.1:{port}", **needs)
        return f"{engine.serve_command()} {THRIFT}"

    return make_server(command, "vllm")


@pytest.fixture(scope="module")
def vllm_again(vllm: Server) -> Server:
    """The same after its end."""
    if vllm.process is None:
        vllm.start()
    return vllm


@pytest.fixture(scope="module")
def second_vllm(vllm_again: Server, make_server: Callable[..., Server]) -> Server:
    """One more, of the same command."""
    first = str(vllm_again.port)
    return make_server(lambda port: vllm_again.command.replace(first, str(port)), "second vllm")


@pytest.fixture(scope="module")
def plain_vllm(model: str, make_server: Callable[..., Server]) -> Server:
    """A server that was started without any of our options."""
    options = f"--max-model-len 512 {THRIFT}"
    return make_server(lambda port: f"vllm serve {model} --port {port} {options}", "plain vllm")


@pytest.fixture(scope="module")
def transformers_serve(model: str, make_server: Callable[..., Server]) -> Server:
    """Another kind of server."""
    command = f"transformers serve {model} --host 127.0.0.1 --port"
    return make_server(lambda port: f"{command} {port}", "transformers serve")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run whose server is killed."""
    return tmp_path_factory.mktemp("run")


def config(folder: Path, model: str, *changes: str) -> DictConfig:
    """A run of a chat model on the parity task."""
    prompt = [
        "prompt=plain",
        f"prompt.system='{RULES}'",
        "prompt.opening='{observation}'",
        "prompt.turn='{observation}'",
    ]
    return composed(
        [
            "experiment=quickstart",
            "policy=qwen2_5_0_5b_lora",
            f"policy.model={model}",
            "policy.dtype=float32",
            f"policy.lora.r={RANK}",
            "policy.gradient_checkpointing=false",
            "datamodule=custom",
            "datamodule._target_=servers.parity.ParityDataModule",
            *prompt,
            "callbacks.adapter_export=null",
            "tasks_per_iteration=2",
            "group_size=4",
            "max_turns=2",
            "max_new_tokens=12",
            f"max_context={CONTEXT}",
            "concurrency=8",
            "update_epochs=1",
            "num_minibatches=2",
            "iterations=3",
            "iterations_per_epoch=1",
            "datamodule.validation_tasks=1",
            "evaluate=false",
            "preflight=false",
            f"paths.root_dir={folder}",
            f"paths.output_dir={folder}",
            *changes,
        ]
    )


def through(server: Server) -> list[str]:
    return ["engine=vllm", f"engine.url={server.url}"]


def test_training_through_a_server_is_what_the_policy_says_and_ends_clearly_with_it(
    vllm: Server, model: str, run_folder: Path
) -> None:
    seen: list[Result] = []
    asked: dict[str, int] = {}
    prompts: list[int] = []

    def prepare(module: AgentModule) -> None:
        engine: Any = module.engine
        poll, submit = engine.poll, engine.submit

        def watched(*words: Any, **named: Any) -> list[Result]:
            results = poll(*words, **named)
            seen.extend(results)
            prompts.extend(asked[result.key] for result in results)
            return results

        def cut(requests: Any) -> None:
            requests = list(requests)
            asked.update((request.key, len(request.prompt)) for request in requests)
            submit(requests)
            if module.iteration == TRAINED:
                vllm.kill()

        engine.poll, engine.submit = watched, cut

    kept = Keep()
    cfg = config(run_folder, model, f"iterations={GOES_ON}", *through(vllm))
    with pytest.raises(VllmError) as error:
        fit(cfg, prepare=prepare, callbacks=[kept])
    said = str(error.value)
    for words in (f"No vLLM server answered at {vllm.url}", "vllm serve", "ckpt_path=last"):
        assert words in said
    assert len(kept.iterations) == TRAINED
    gaps = []
    for done in kept.iterations:
        batch = done.batch
        inside = batch.response_index >= 0
        gaps.append(float((batch.sampler_logprobs - batch.old_logprobs)[inside].abs().max()))
    assert max(gaps) < GAP
    trained = sum(done.skipped is None for done in kept.iterations)
    assert trained, "every group was uniform: the adapter never changed"
    assert len({result.version for result in seen}) >= TRAINED
    reused = sum(result.reused for result in seen)
    assert reused > 0
    keep(
        python=platform.python_version(),
        torch=torch.__version__,
        vllm=version_of("vllm"),
        transformers_of_the_servers=version_of("transformers"),
        trained={
            "iterations": TRAINED,
            "iterations with an update": trained,
            "responses": len(seen),
            "largest gap of log-probabilities, nats": max(gaps),
            "prompt tokens found in the prefix cache": reused,
            "prompt tokens": sum(prompts),
            "said at the kill": said.splitlines()[0].replace(vllm.url, "http://host:port"),
        },
    )


def test_a_run_goes_on_once_its_server_is_back(
    vllm_again: Server, model: str, run_folder: Path
) -> None:
    words = [f"iterations={GOES_ON}", f"ckpt_path={run_folder}/checkpoints/last.ckpt"]
    summary = train(config(run_folder, model, *words, *through(vllm_again)))
    assert summary["iterations"] == GOES_ON
    keep(went_on={"from iteration": TRAINED, "to iteration": summary["iterations"]})


def version_of(package: str) -> str:
    python = Path(os.environ["VLLM_VENV"]) / "bin" / "python"
    code = f"from importlib.metadata import version; print(version({package!r}))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_two_servers_share_the_episodes_and_one_that_is_killed_is_left_out(
    vllm_again: Server, second_vllm: Server, model: str, tmp_path: Path, caplog: Any
) -> None:
    vllm, other = vllm_again, second_vllm
    cfg = config(tmp_path, model, "engine=vllm", f"engine.urls=[{vllm.url},{other.url}]")
    with built(cfg) as (_, module, datamodule):
        engine: Any = module.engine
        engine.sync(module.policy, 0)
        submit, killed = engine.submit, []

        def cut(requests: Any) -> None:
            submit(requests)
            if not killed:
                killed.append(other)
                other.kill_engine()

        engine.submit = cut
        collector = module.collector(1.0, ("two servers",), datamodule.pool)
        played = collector.collect(make_groups(datamodule.tasks("train")[:2], 4))
        engine.shutdown()
    assert len(played) == 8
    assert all(trajectory.turns and not trajectory.infra_error for trajectory in played)
    (warned,) = [r.getMessage() for r in caplog.records if "1 of 2 servers go on" in r.getMessage()]
    assert other.url in warned
    last_words = re.search(r"its last words: (.*)", warned)
    keep(
        two_servers={
            "episodes": 8,
            "finished after one was killed": len(played),
            "last words": last_words and last_words[1],
        }
    )


def test_a_server_without_our_options_is_told_all_that_it_lacks(
    plain_vllm: Server, model: str
) -> None:
    needs = {"model": model, "max_lora_rank": RANK, "max_context": CONTEXT, "dtype": "float32"}
    with pytest.raises(VllmError) as error:
        VllmEngine(plain_vllm.url, **needs).check_server()
    plain_vllm.kill()
    said = str(error.value)
    found = [line.removeprefix("  - ") for line in said.splitlines() if line.startswith("  - ")]
    assert len(found) == 4
    for words in ("max_model_len=512", "RUNTIME_LORA_UPDATING", "at the sampling", "prefix cache"):
        assert any(words in line for line in found), words
    keep(started_without_our_options=found)


def test_tokens_per_second_beside_our_own_engine(
    vllm_again: Server, model: str, tmp_path: Path
) -> None:
    cfg = config(tmp_path, model, "max_new_tokens=32", "engine=hf")
    with built(cfg) as (_, module, datamodule):
        needs = {"max_lora_rank": RANK, "max_context": CONTEXT, "dtype": "float32"}
        engines = {"vllm": VllmEngine(vllm_again.url, model, **needs), "hf": module.engine}
        rounds: dict[str, list[float]] = {name: [] for name in engines}
        for number in range(ROUNDS):
            for name, engine in engines.items():
                module.engine = engine
                engine.sync(module.policy, number)
                collector = module.collector(1.0, ("speed", number), datamodule.pool)
                start = time.monotonic()
                played = collector.collect(make_groups(datamodule.tasks("train")[:2], 4))
                seconds = time.monotonic() - start
                turns = [turn for trajectory in played for turn in trajectory.turns]
                rounds[name].append(sum(len(turn.logprobs) for turn in turns) / seconds)
        engines["vllm"].shutdown()
    best = {name: round(max(found), 1) for name, found in rounds.items()}
    assert min(best.values()) > 0
    found = {"tokens/s, best round": best, "rounds": ROUNDS, "threads": torch.get_num_threads()}
    keep(speed={**found, "ratio": round(best["vllm"] / best["hf"], 2)})


def chat(folder: Path, model: str, url: str) -> dict[str, Any]:
    """A few games of the parity task over a chat endpoint."""
    words = [
        "policy=api",
        "datamodule=custom",
        "datamodule._target_=servers.parity.ParityDataModule",
        "prompt=plain",
        "prompt.opening='{observation}'",
        "prompt.turn='{observation}'",
        "memory=transcript",
        f"base_url={url}/v1",
        f"model={model}",
        "concurrency=2",
        "max_turns=3",
        "max_new_tokens=24",
        "splits=[valid_seen]",
        f"paths.root_dir={folder}",
        f"paths.output_dir={folder}",
    ]
    return evaluate(composed(words, "eval"))


def played_twice(folder: Path, model: str, url: str) -> dict[str, Any]:
    """The figures of an evaluation that, asked for again, sends no request."""
    first = chat(folder, model, url)
    again = chat(folder, model, url)
    assert first["complete"]
    assert first["tokens"].pop("this_run") > 0
    assert again["tokens"].pop("this_run") == 0
    assert again == first
    turns = sum(episode["turns"] for episode in first["episodes"])
    return {
        "games": first["success"]["episodes"],
        "replies": turns,
        "tokens": first["tokens"],
        "handled": first["handled"],
        "requests of a second run": 0,
    }


def overflow(model: str, url: str) -> str:
    """What the endpoint says of a conversation that is too long."""
    endpoint = Endpoint(model, f"{url}/v1", max_retries=0, timeout_s=300.0)
    long = [{"role": "user", "content": "word " * 12_000}]
    with pytest.raises(ContextFullError) as error:
        endpoint.reply(long, max_new_tokens=8, temperature=1.0)
    endpoint.close()
    return re.sub(r"\s+", " ", str(error.value))[:300]


def test_vllms_chat_endpoint_is_played_resumed_and_overflows_in_its_own_words(
    vllm_again: Server, model: str, tmp_path: Path
) -> None:
    url = vllm_again.url
    keep(chat_of_vllm={**played_twice(tmp_path, model, url), "overflow": overflow(model, url)})


def test_transformers_serve_is_played_and_resumed(
    transformers_serve: Server, model: str, tmp_path: Path
) -> None:
    keep(chat_of_transformers=played_twice(tmp_path, model, transformers_serve.url))
