"""What a run says of memory before it takes any, and where it ran out."""

from __future__ import annotations

import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from models.families import build
from omegaconf import OmegaConf
from runs import composed, toy_config
from tiny_play import make_policy, word_tokenizer

from aem_lightning.modules import Architecture, Lora, Policy, build_tiny_model, self_check
from aem_lightning.modules.footprint import Footprint, optimizer_bytes
from aem_lightning.modules.update import take_step
from aem_lightning.rollout import Request, Sampling, SlotEngine
from aem_lightning.rollout.shortage import ShortOfMemoryError, in_stage
from aem_lightning.runner import build as building
from aem_lightning.runner import memory_plan, starting, training
from aem_lightning.runner.checks import ConfigError, check_config
from aem_lightning.runner.known_models import parameters_by_name
from aem_lightning.runner.memory_plan import Device, footprint_of, longest, plan_of, planned

ON_GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
ON_CPU = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
GB = 10**9


# ---------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize(
    ("name", "layers"), [("Qwen2", 2), ("Qwen2", 5), ("Phi", 2), ("Gemma 3", 2), ("Mixtral", 2)]
)
def test_bytes_by_arithmetic_are_others_than_those_of_the_tensors(name, layers):
    model = build(name, num_hidden_layers=layers)
    policy = Policy(model, word_tokenizer(), Lora(r=2, alpha=4))
    config, lora = policy.causal_lm.config, Lora(r=2, alpha=4)
    drawn = torch.get_rng_state()
    told = Footprint.before_loading(config, lora, torch.float32, torch.float32)
    assert torch.equal(torch.get_rng_state(), drawn)
    parameters = list(policy.parameters())
    assert told.weights == sum(p.nbytes for p in parameters if not p.requires_grad)
    assert told.adapters == sum(p.nbytes for p in parameters if p.requires_grad)
    engine = SlotEngine(slots=2, max_length=64)
    engine.sync(policy, 0)
    engine.submit([Request("a", [1, 2], Sampling(1.0, 2), 0)])
    engine.poll(wait_all=True)
    cache = engine._model.cache
    blocks = [*cache._keys.values(), *cache._values.values()]
    of_token = sum(block.nbytes // (block.shape[0] * block.shape[2]) for block in blocks)
    assert told.key_values(3, 5) == 15 * of_token


@pytest.mark.parametrize(
    "make",
    [
        partial(torch.optim.AdamW, lr=0.1),
        partial(torch.optim.SGD, lr=0.1),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    ],
)
def test_an_optimizer_keeps_other_states_than_are_told(make):
    trained = [torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones(7))]
    optimizer = make(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [v for state in optimizer.state.values() for v in state.values()]
    kept = sum(value.nbytes for value in states if torch.is_tensor(value))
    assert optimizer_bytes(make, [12, 7]) == kept


def test_what_an_update_keeps_is_another_size_altogether():
    shape = Architecture(64, 192, 3, 4, 2)
    policy = Policy(build_tiny_model(word_tokenizer(), shape, 0), word_tokenizer(), Lora(4, 8))
    ids = torch.ones(1, 128, dtype=torch.long)
    kept: dict[int, int] = {}

    def keep(tensor):
        if tensor.grad_fn is not None or not tensor.is_leaf:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.hidden_states(ids, ids > 0)
    told = Footprint.of(policy, torch.float32).activations(128, checkpointed=False)
    assert 0.5 < told / sum(kept.values()) < 2


def test_four_bits_are_counted_as_sixteen():
    config = build("Qwen2").config
    make = partial(Footprint.before_loading, config, None, torch.bfloat16, torch.bfloat16)
    policy = Policy(build("Qwen2"), word_tokenizer())
    policy.requires_grad_(False)
    linear = sum(
        module.weight.numel()
        for name, module in policy.causal_lm.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    )
    half = Footprint.of(policy.bfloat16(), torch.bfloat16)
    four = Footprint.of(policy, torch.bfloat16, four_bits=True)
    assert half.weights - four.weights == pytest.approx(linear * (2 - 0.5159), rel=1e-3)
    assert make().weights == 0  # without adapters everything trains


# ------------------------------------------------------------------------------------------- plans


@pytest.fixture(scope="module")
def paper():
    """The paper's ALFWorld run and its SWE run, with overrides as keys."""
    known = {name: composed([f"experiment={name}"]) for name in ("alfworld_aem", "swe")}

    def changed(name, **changes):
        cfg = known[name].copy()
        cfg.paths.output_dir = "."
        for key, value in changes.items():
            OmegaConf.update(cfg, key.replace("__", "."), value)
        return cfg

    return changed


def on(monkeypatch, gigabytes, kind="GPU", free=None):
    total = int(gigabytes * GB)
    device = Device(kind, total if free is None else int(free * GB), total)
    monkeypatch.setattr(memory_plan, "device_of", lambda cfg: device)
    return device


def test_auto_chooses_more_than_memory_holds_or_less(monkeypatch, paper, caplog):
    caplog.set_level("INFO")
    cfg = paper("alfworld_aem", concurrency="auto", micro_batch_tokens="auto")
    check_config(cfg)
    found = []
    for gigabytes in (8, 24, 140):
        device = on(monkeypatch, gigabytes)
        chosen = planned(cfg)
        tokens = longest(chosen, chosen.micro_batch_tokens)
        plan = plan_of(chosen, footprint_of(chosen), chosen.concurrency, tokens)
        assert plan.total() <= device.free
        found.append((chosen.concurrency, chosen.micro_batch_tokens))
        assert f"concurrency=auto: concurrency={chosen.concurrency}" in caplog.text
    assert cfg.concurrency == "auto"
    assert found == sorted(found)
    assert found[0][0] < found[1][0] <= found[-1][0] == 128  # no more than there are episodes
    assert found[0][1] < found[-1][1] == 65536
    with pytest.raises(ConfigError, match="allowed are concurrency=auto, or a whole number from"):
        check_config(paper("alfworld_aem", concurrency="many"))
    unknown = paper("alfworld_aem", policy__model="some/model")
    assert planned(unknown) is unknown
    assert "some/model cannot be known before it is loaded" in caplog.text
    unknown.concurrency = "auto"
    with pytest.raises(ConfigError, match=r"concurrency=auto: how large some/model.*=64"):
        planned(unknown)


def test_the_plan_names_no_setting_to_lower(monkeypatch, paper, caplog):
    caplog.set_level("INFO")
    cfg = paper("alfworld_aem")
    on(monkeypatch, 24, free=16)
    planned(cfg)
    for name in ("weights", "adapters", "gradients", "optimizer", "keys", "graphs", "activations"):
        assert name in caplog.text
    (fewer,) = re.findall(r"It may not fit: lower concurrency=(\d+) first", caplog.text)
    assert 0 < int(fewer) < 128
    cfg.concurrency = int(fewer)
    planned(cfg)
    assert "Should it run out: lower" in caplog.text


def test_the_supervised_stage_is_planned_as_if_it_sampled(monkeypatch, paper, caplog, tmp_path):
    caplog.set_level("INFO")
    on(monkeypatch, 24)
    cfg = paper("alfworld_aem", stage="warm_start", concurrency="auto")
    assert planned(cfg).concurrency == 128  # experts in play; no engine holds keys and values
    footprint = footprint_of(cfg)
    plan = plan_of(cfg, footprint, 1, 16384)
    assert not plan.rollout
    assert plan.always["optimizer states"] == optimizer_bytes(torch.optim.AdamW, footprint.trained)
    assert "policy.warm_start.batch_tokens=16384" in caplog.text
    assert "keys and values" not in caplog.text
    cfg.policy.warm_start.batch_tokens = 90_000
    planned(cfg)
    (fewer,) = re.findall(r"lower policy.warm_start.batch_tokens=(\d+) first", caplog.text)[-1:]
    assert 0 < int(fewer) < 90_000
    with pytest.raises(MemoryError, match=r"(?s)does not fit.*batch_tokens=4096.*1.5B"):
        planned(paper("swe", stage="warm_start"))
    elsewhere = f"paths.root_dir={tmp_path}"  # not where a warm start may be there already
    tiny = composed(["experiment=quickstart", "stage=warm_start", elsewhere])
    made = footprint_of(tiny)  # trains whole, without adapters
    assert made.weights == 0
    assert plan_of(tiny, made, 1, 2048).always["weights"] == made.adapters > 0


def test_a_value_head_takes_no_memory(paper):
    without = footprint_of(paper("alfworld_aem"))
    target = {"_target_": "aem_lightning.algorithms.PPO"}
    cfg = paper("alfworld_aem", advantage=target)
    assert sum(footprint_of(cfg).trained) - sum(without.trained) == 1536 + 1


@pytest.mark.parametrize("gigabytes", [24, 80, 141])
def test_a_policy_of_32b_starts_on_one_gpu(monkeypatch, paper, gigabytes):
    cfg, offered = paper("swe"), []
    on(monkeypatch, gigabytes)
    monkeypatch.setattr(Policy, "from_pretrained", None)
    monkeypatch.setattr(memory_plan, "train_instead", lambda cfg, to: offered.append(to) or "it")
    with pytest.raises(MemoryError, match=r"Qwen/Qwen3-32B does not fit.*Nothing was fetched") as e:
        planned(cfg)
    assert f"this GPU has {gigabytes}.0 GB" in str(e.value)
    assert offered.pop()["trainer"] == "fsdp"  # of several GPUs
    assert ("policy.quantization" in offered[0]) == (gigabytes == 80)
    assert ("policy.model" in offered[0]) == (gigabytes < 80)
    for changes in offered:
        other = {key.replace(".", "__"): value for key, value in changes.items()}
        assert planned(paper("swe", **other)).concurrency >= 1
    on(monkeypatch, 2000)
    assert planned(cfg) is cfg


@pytest.mark.parametrize(
    ("model", "fits"),
    [
        ("meta-llama/Llama-3.1-70B-Instruct", False),  # by its name
        ("Qwen/Qwen2.5-72B-Instruct", False),
        ("Qwen/Qwen2.5-7B-Instruct", True),
        ("somebody/Model-8B", True),
    ],
)
def test_other_sizes_are_taken_for_what_they_are_not(monkeypatch, paper, model, fits):
    on(monkeypatch, 80)
    cfg = paper("alfworld_aem", policy__model=model)
    if fits:
        planned(cfg)
    else:
        with pytest.raises(MemoryError, match="does not fit"):
            planned(cfg)
    on(monkeypatch, 33, kind="machine")  # whose memory is paged: weights and optimizer alone count
    if fits:
        planned(cfg)
    assert parameters_by_name("x/Mini") is None


# ------------------------------------------------------------------------------------------ stages


@pytest.mark.parametrize("error", [ON_GPU, ON_CPU, MemoryError()])
def test_memory_runs_out_without_a_stage_or_a_setting(error):
    with (
        pytest.raises(
            ShortOfMemoryError, match=r"^Out of memory in decode: .*concurrency=32 \(64 now\)"
        ) as e,
        in_stage("rollout"),
        in_stage("decode", concurrency=64),
    ):
        raise error
    assert e.value.__cause__ is error
    with pytest.raises(RuntimeError, match=r"^shapes$"), in_stage("decode", concurrency=64):
        raise RuntimeError("shapes")


def short(*given, **options):
    raise ON_GPU


def test_a_stage_of_a_run_ends_in_a_bare_traceback(monkeypatch, tmp_path):
    policy = make_policy()
    engine = SlotEngine(slots=4, max_length=32)
    engine.sync(policy, 0)
    forward = engine._model.forward
    for width, stage in ((2, "prefill"), (1, "decode")):
        engine.submit([Request(stage, [1, 2], Sampling(1.0, 3), 0)])

        def failing(rows, starts, chunks, width=width):
            return short() if len(chunks[0]) == width else forward(rows, starts, chunks)

        monkeypatch.setattr(engine._model, "forward", failing)
        with pytest.raises(MemoryError, match=rf"in {stage}: .*concurrency=2 .*max_context=16 "):
            engine.poll()
        engine.close(stage)
    with pytest.raises(MemoryError, match=r"in optimizer step: .*policy\.lora\.r"):
        take_step(SimpleNamespace(step=short))
    monkeypatch.setattr(Policy, "from_pretrained", short)
    cfg = toy_config(tmp_path, "some/model")
    with pytest.raises(MemoryError, match=r"in loading the policy: .*policy\.quantization=nf4"):
        building.load_policy(cfg, "some/model", None)


# ------------------------------------------------------------------------------------------- start


@pytest.mark.parametrize("key", ["policy.model", "+policy.warm_start.base"])
def test_games_are_made_for_a_model_that_comes_out_wrong(monkeypatch, tmp_path, key):
    def wrong(*given):
        raise ValueError("self-check: in padded rows")

    def made(cfg):
        raise AssertionError("games are made")

    monkeypatch.setattr(building, "load_policy", lambda *given, **options: make_policy())
    monkeypatch.setattr(training, "build_datamodule", made)
    monkeypatch.setattr(starting, "self_check", wrong)
    with pytest.raises(ValueError, match="self-check: in padded rows"):
        training.train(toy_config(tmp_path / "given", None, f"{key}=some/model"))
    with pytest.raises(AssertionError, match="games are made"):  # whose words a tiny policy has
        training.train(toy_config(tmp_path / "tiny", None))


def test_a_model_is_tried_more_than_once_at_a_start():
    policy, engine = make_policy(), SlotEngine(slots=2, max_length=60, bucket=16, cache="auto")
    passes = []
    policy.head.weight  # noqa: B018 (measured, which is a pass)
    policy.head.decoder.register_forward_pre_hook(lambda *given: passes.append(1))
    assert self_check.self_check(policy, engine) is not None
    # Two of its own, padded and packed; two turns of a prefill and a step; the engine's own head.
    assert len(passes) <= 2 + 2 + 4 + 1
    passes.clear()
    engine.sync(policy, 1)
    assert self_check.attention.is_packed("auto", policy.causal_lm)
    assert not passes
