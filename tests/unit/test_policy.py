import builtins
import os

import pytest
import torch
from peft import PeftModel
from runs import composed
from tiny_play import CHATML, PLAIN, SMALL, byte_tokenizer, make_policy, word_tokenizer
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from aem_lightning.modules import Architecture, Lora, Policy, build_tiny_model, check_dtype
from aem_lightning.modules.policy import load_tokenizer
from aem_lightning.modules.sharding import _read, _weight_files
from aem_lightning.rollout import PromptEncoder
from aem_lightning.runner.early import read_template
from aem_lightning.runner.trainers import precision_of, stored_dtype

LORA = {"r": 2, "alpha": 4}
# bitsandbytes packs blocks of 64 weights.
WIDE = Architecture(
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
)


@pytest.fixture
def rows():
    """Two rows, the second one padded, and the tokens to score."""
    ids = torch.randint(3, 20, (2, 9), generator=torch.Generator().manual_seed(0))
    ids[1, 6:] = 0
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, 3:5] = mask[0, 7:9] = mask[1, 1:6] = True
    return ids, mask


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder, as the warm start leaves it."""
    path = tmp_path_factory.mktemp("model")
    make_policy(lora=False).save_model(path)
    return str(path)


def naive(model, ids, mask, temperature=1.0):
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    logprobs = (logits / temperature).log_softmax(-1)[:, :-1]
    chosen = logprobs.gather(2, ids[:, 1:, None])[..., 0]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return chosen[mask[:, 1:]], entropy[mask[:, 1:]]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_scores_are_those_of_a_plain_log_softmax(rows, temperature):
    policy = make_policy(awake=True)
    logprobs, entropies = policy.score(*rows, temperature)
    expected = naive(policy.causal_lm, *rows, temperature)
    torch.testing.assert_close(logprobs, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropies, expected[1], atol=1e-5, rtol=1e-5)


def test_greedy_play_is_scored_at_temperature_one(rows):
    policy = make_policy(awake=True)
    assert torch.equal(policy.score(*rows, 0.0)[0], policy.score(*rows, 1.0)[0])


def test_what_stands_in_the_padding_changes_no_score(rows):
    policy, (ids, mask) = make_policy(awake=True), rows
    other = ids.clone()
    other[1, 6:] = 7
    assert torch.equal(policy.score(ids, mask)[0], policy.score(other, mask)[0])


def test_gradients_reach_every_adapter_and_nothing_else(rows):
    policy = make_policy(awake=True)
    policy.score(*rows)[0].sum().backward()
    assert policy.trainable()
    assert all("lora_" in name for name in policy.trainable())
    assert all(p.grad is not None and p.grad.any() for p in policy.trainable().values())
    assert all(p.grad is None for p in policy.parameters() if not p.requires_grad)


def test_the_reference_is_the_base_model_and_the_policy_comes_back_after_it(rows):
    policy = make_policy(awake=True)
    before = policy.score(*rows)[0]
    with policy.reference():
        reference = policy.score(*rows)[0]
    assert torch.equal(reference, make_policy(lora=False).score(*rows)[0])
    assert (reference - before).abs().max() > 1e-2
    assert torch.equal(policy.score(*rows)[0], before)


def test_a_policy_without_adapters_has_no_reference_and_no_adapter_to_save(tmp_path):
    policy = make_policy(lora=False)
    with pytest.raises(RuntimeError, match=r"policy\.lora or loss\.kl_coef=0"), policy.reference():
        pass
    with pytest.raises(RuntimeError, match="save_model"):
        policy.save_adapter(tmp_path)


def test_a_saved_adapter_gives_the_same_logits_through_peft(folder, rows, tmp_path):
    policy = Policy.from_pretrained(folder, lora=Lora(r=2, alpha=4))
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.normal_(std=0.2)
    policy.save_adapter(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(folder)
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    expected = naive(policy.causal_lm, *rows)[0]
    assert torch.equal(naive(loaded, *rows)[0], expected)
    assert load_tokenizer(str(tmp_path)).get_vocab() == policy.tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("umask", "of_folder", "of_file"), [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600)]
)
def test_a_server_of_another_account_cannot_read_an_adapter(
    folder, tmp_path, umask, of_folder, of_file
):
    tmp_path.chmod(0o700)  # as mkdtemp makes it
    before = os.umask(umask)
    try:
        Policy.from_pretrained(folder, lora=LORA).save_adapter(tmp_path)
    finally:
        os.umask(before)
    assert tmp_path.stat().st_mode & 0o777 == of_folder
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {of_file}


def test_a_saved_model_holds_its_adapters_merged_and_the_policy_stays_as_it_was(rows, tmp_path):
    policy = make_policy(awake=True)
    before = policy.score(*rows)[0]
    policy.save_model(tmp_path)
    assert torch.equal(policy.score(*rows)[0], before)
    assert policy.peft is not None
    model = Qwen2ForCausalLM.from_pretrained(tmp_path)
    assert model.config.use_cache
    assert not any("lora" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(naive(model, *rows)[0], before, atol=1e-5, rtol=1e-5)


def test_words_survive_saving_and_loading(folder):
    """The architecture's own tokenizer class would cut the words into bytes."""
    text = "A coin glints near the red box ."
    policy = Policy.from_pretrained(folder)
    before = word_tokenizer()
    assert policy.tokenizer(text).input_ids == before(text).input_ids
    assert policy.tokenizer.decode(policy.tokenizer(text).input_ids) == text
    assert policy.tokenizer.chat_template == before.chat_template
    assert policy.tokenizer.eos_token == before.eos_token


def test_loading_gives_back_the_weights_that_were_saved(folder, rows):
    saved, loaded = make_policy(lora=False), Policy.from_pretrained(folder)
    assert torch.equal(saved.score(*rows)[0], loaded.score(*rows)[0])


def test_a_tiny_model_depends_on_its_seed_alone():
    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    one = build_tiny_model(tokenizer, SMALL, seed=3)
    stream = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(stream, torch.rand(1))  # the global stream was left alone
    two, three = (build_tiny_model(tokenizer, SMALL, seed) for seed in (3, 4))
    weights = [model.get_input_embeddings().weight for model in (one, two, three)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_adapters_of_a_half_precision_model_stay_in_full_precision(folder):
    policy = Policy.from_pretrained(folder, lora=LORA, dtype="bfloat16")
    frozen = {p.dtype for p in policy.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    assert {p.dtype for p in policy.trainable().values()} == {torch.float32}


def test_a_policy_to_be_sharded_gets_other_adapters_or_computes_without_weights(folder, rows):
    options = {"lora": LORA, "dtype": "bfloat16"}
    drawn = []
    for sharded in (False, True):
        torch.manual_seed(0)
        policy = Policy.from_pretrained(folder, sharded=sharded, **options)
        drawn.append(policy)
    plain, hollow = (policy.trainable() for policy in drawn)
    torch.testing.assert_close(hollow, plain, rtol=0, atol=0)
    buffers = [dict(policy.named_buffers()) for policy in drawn]
    torch.testing.assert_close(buffers[1], buffers[0], rtol=0, atol=0)
    frozen = [p for p in drawn[1].parameters() if not p.requires_grad]
    assert all(p.untyped_storage().nbytes() == p.element_size() for p in frozen)
    with pytest.raises(ValueError, match=r"Type trainer\.strategy=auto"):
        drawn[1].score(*rows)


def test_a_shard_that_is_not_in_the_files_is_made_up(folder):
    files = _weight_files(folder)
    like = torch.empty(1, dtype=torch.bfloat16)
    name = next(name for name in files if name.endswith("q_proj.weight"))
    inside = name.replace(".weight", ".base_layer.weight")
    wide = like.expand(SMALL.hidden_size, SMALL.hidden_size)
    assert _read(files, inside, wide).dtype == torch.bfloat16
    for wrong, told in (
        (name, r"hold \(16, 16\) .*q_proj"),
        ("model.norm2", "hold no model.norm2"),
    ):
        with pytest.raises(ValueError, match=f"trainer=fsdp: .*{told}.* type trainer=ddp"):
            _read(files, wrong, like)


def test_gradient_checkpointing_changes_no_gradient(folder, rows):
    gradients = []
    for checkpointing in (False, True):
        policy = Policy.from_pretrained(folder, lora=LORA, gradient_checkpointing=checkpointing)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in policy.trainable().values():
                parameter.normal_(std=0.1, generator=generator)
        policy.train()
        policy.score(*rows)[0].sum().backward()
        gradients.append([parameter.grad for parameter in policy.trainable().values()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_gradient_checkpointing_computes_the_layers_of_a_loaded_policy_again(
    tmp_path, rows, quantization, recwarn
):
    if quantization:
        pytest.importorskip("bitsandbytes")
    tokenizer = word_tokenizer()
    Policy(build_tiny_model(tokenizer, WIDE, seed=0), tokenizer).save_model(tmp_path)
    policy = Policy.from_pretrained(
        str(tmp_path), lora=LORA, gradient_checkpointing=True, quantization=quantization
    )
    calls = []
    layer = policy.causal_lm.get_decoder().layers[0]
    layer.input_layernorm.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    # As training finds it: nothing in a run calls train().
    policy.score(*rows)[0].sum().backward()
    assert len(calls) == 2
    assert not [w for w in recwarn if "use_reentrant" in str(w.message)]


def test_a_chat_template_of_ones_own_takes_the_place_of_the_models(folder, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(CHATML, encoding="utf-8")
    policy = Policy.from_pretrained(folder, chat_template=read_template(str(template)))
    assert policy.tokenizer.chat_template == CHATML


def test_only_the_named_modules_get_adapters(folder):
    policy = Policy.from_pretrained(folder, lora={**LORA, "target_modules": ["q_proj"]})
    assert {name.split(".")[-4] for name in policy.trainable()} == {"q_proj"}


def test_a_model_that_is_not_there_says_how_to_fetch_it_and_how_to_do_without():
    with pytest.raises(FileNotFoundError) as error:
        Policy.from_pretrained("nobody/no-such-model")
    message = str(error.value)
    assert "hf download nobody/no-such-model" in message
    assert "policy.model=/path/to/folder" in message
    assert "policy=tiny datamodule=alfworld_generated" in message


@pytest.mark.parametrize(
    ("units", "gpu", "stored"),
    [
        ({"avx2": True, "amx_bf16": False}, False, torch.float32),
        ({"avx2": True, "amx_bf16": True}, False, torch.bfloat16),
        ({"avx512_bf16": True}, False, torch.bfloat16),
        ({}, False, torch.float32),
        ({"avx2": True}, True, torch.bfloat16),
    ],
)
def test_auto_stores_bfloat16_where_it_is_multiplied_fast(units, gpu, stored, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert check_dtype("auto") is stored


def test_a_run_on_the_cpu_of_a_machine_with_a_gpu_stores_or_computes_as_on_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    words = ["paths.output_dir=x", "policy.dtype=auto", "trainer.precision=null"]
    for accelerator, stored, precision in (
        ("cpu", torch.float32, "32-true"),
        ("auto", torch.bfloat16, "bf16-mixed"),
        ("gpu", torch.bfloat16, "bf16-mixed"),
    ):
        cfg = composed([*words, f"trainer.accelerator={accelerator}"])
        assert (stored_dtype(cfg, cfg.policy.dtype), precision_of(cfg)) == (stored, precision)


def test_an_unknown_quantization_names_what_is_allowed(folder):
    with pytest.raises(ValueError, match="allowed: null, nf4"):
        Policy.from_pretrained(folder, quantization="int3")


def test_quantization_without_its_package_names_the_extra_to_install(folder, monkeypatch):
    find = builtins.__import__

    def without_bitsandbytes(name, *args, **kwargs):
        if name == "bitsandbytes":
            raise ImportError(name)
        return find(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_bitsandbytes)
    with pytest.raises(ImportError, match=r"aem-lightning\[quant\].*policy\.quantization=null"):
        Policy.from_pretrained(folder, quantization="nf4")


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """A policy with 4-bit weights and what its weights were before."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    path = tmp_path_factory.mktemp("wide")
    tokenizer = word_tokenizer()
    whole = Policy(build_tiny_model(tokenizer, WIDE, seed=0), tokenizer)
    whole.save_model(path)
    policy = Policy.from_pretrained(str(path), lora=LORA, dtype="bfloat16", quantization="nf4")
    layer = policy.causal_lm.model.layers[0].mlp.up_proj.base_layer
    assert isinstance(layer, bitsandbytes.nn.Linear4bit)
    return policy, whole


def test_a_four_bit_policy_is_near_its_whole_weights_and_trains_its_adapters(quantised, rows):
    policy, whole = quantised
    logprobs, _ = policy.score(*rows)
    torch.testing.assert_close(logprobs, whole.score(*rows)[0], atol=0.5, rtol=0)
    logprobs.sum().backward()
    assert all("lora_" in name for name in policy.trainable())
    assert any(p.grad.any() for p in policy.trainable().values())


def test_a_four_bit_policy_casts_its_head_in_every_pass(quantised):
    policy, _ = quantised
    frozen = [p for p in policy.causal_lm.parameters() if not p.requires_grad]
    assert policy.causal_lm.lm_head.weight.dtype == torch.bfloat16
    assert torch.float32 not in {parameter.dtype for parameter in frozen}


def test_the_four_bit_weights_of_all_ranks_pass_through_the_first_gpu(folder, monkeypatch):
    pytest.importorskip("bitsandbytes")
    asked = []

    def load(*_, **settings):
        asked.append(settings["device_map"])
        raise OSError

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    for count, rank in ((8, "3"), (1, "3"), (0, "")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setattr(torch.cuda, "is_available", lambda count=count: bool(count))
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        with pytest.raises(FileNotFoundError):
            Policy.from_pretrained(folder, quantization="nf4")
    assert asked == [{"": 3}, {"": 0}, None]


def test_a_four_bit_policy_is_saved_whole_without_rounding_its_adapters_away(
    quantised, rows, tmp_path
):
    policy, _ = quantised
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            parameter.fill_(0.05 if "lora_B" in name else 0.1)
        expected = policy.score(*rows)[0]
    policy.save_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    torch.testing.assert_close(naive(model, *rows)[0], expected, atol=0.03, rtol=0)


def test_a_tokenizer_of_another_kind_serves_a_policy_too(tmp_path):
    policy = make_policy(byte_tokenizer())
    policy.save_adapter(tmp_path)
    encoder = PromptEncoder(load_tokenizer(str(tmp_path)), PLAIN)
    assert encoder.decode(encoder.demonstrate("open red box")) == "open red box"
