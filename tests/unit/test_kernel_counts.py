"""What a GPU would be asked to do, counted on a CPU: casts, uploads, shapes, memory."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from local_coin import make_agent
from peft import LoraConfig, inject_adapter_in_model
from test_agent_module import fit
from test_slot_engine import make_model, play, request
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from aem_lightning.functional.logprob import wide_product
from aem_lightning.modules import scoring
from aem_lightning.modules.memory import TokenBudget
from aem_lightning.rollout import SlotEngine, slot_model
from aem_lightning.rollout.adapters import AdapterCopies
from aem_lightning.rollout.padding import doubled, widened
from aem_lightning.rollout.slot_model import SlotModel


class Casts(TorchDispatchMode):
    """Counts kernels, and those of them that turn a tensor into another floating-point type."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.casts = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.kernels += 1
            source = args[0] if args and isinstance(args[0], Tensor) else None
            if func is torch.ops.aten._to_copy.default and source is not None:
                floating = source.is_floating_point() and result.is_floating_point()
                self.casts += floating and source.dtype != result.dtype
        return result


class Uploads(TorchFunctionMode):
    """Counts tensors made of Python numbers: each list in an index is one, for every use."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.count += sum(isinstance(part, list) for part in index)
        elif func is torch.tensor:
            self.count += 1
        return func(*args, **(kwargs or {}))


def adapted(layers: int) -> Any:
    """A policy of many small layers in bfloat16, with adapters in float32."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    model = inject_adapter_in_model(lora, Qwen2ForCausalLM(config).to(torch.bfloat16))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) * 0.2
    return SimpleNamespace(causal_lm=model)


def decoded(model: SlotModel) -> tuple[Casts, Tensor]:
    """The counts and logits of a decode step, without autocast's cache: as it is captured."""
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), model.sampling_mode():
        model.forward([0, 1], [0, 0], [[1, 2, 3], [4, 5, 6]])
        with Casts() as counts:
            logits = model.forward([0, 1], [3, 3], [[4], [5]])
    return counts, logits


def test_a_decode_step_casts_its_adapters_anew() -> None:
    policy = adapted(layers=28)
    with torch.autocast("cpu", torch.bfloat16):
        engine = SlotEngine(slots=4, max_length=64, bucket=32)
        engine.sync(policy, 0)
    counts, logits = decoded(engine._model)
    assert counts.casts < 150
    engine._model.adapters = AdapterCopies(policy.causal_lm, torch.float32)  # none
    plain, expected = decoded(engine._model)
    assert plain.casts > counts.casts + 3 * 7 * 28  # an input and two weights of seven products
    assert torch.equal(logits, expected)


def test_copies_are_those_of_earlier_weights_or_stay_in_the_model() -> None:
    policy = adapted(layers=1)
    weight = policy.causal_lm.model.layers[0].mlp.up_proj.lora_B["default"].weight
    with torch.autocast("cpu", torch.bfloat16):
        engine = SlotEngine(slots=4, max_length=64, bucket=32)
        engine.sync(policy, 0)
        before = decoded(engine._model)[1]
        with torch.no_grad():
            weight.add_(1.0)
        engine.sync(policy, 1)
        after = decoded(engine._model)[1]
    assert not torch.equal(before, after)
    assert policy.causal_lm.model.layers[0].mlp.up_proj.lora_B["default"].weight is weight
    assert weight.dtype == torch.float32


def test_scoring_under_autocast_comes_out_in_other_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = make_agent()
    done = fit(agent).iterations[0]

    def scores() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return agent.scores(done.batch, [[*range(len(done.batch.row_length))]])[0]

    cast = scores()
    monkeypatch.setattr(scoring, "compute_dtype", lambda device, stored: stored)
    assert torch.equal(cast, scores())


def test_a_compaction_uploads_its_rows_for_every_layer() -> None:
    engine = SlotEngine(slots=6, max_length=64, bucket=32)
    engine.sync(adapted(layers=4), 0)
    counts, compact = [], engine._compact

    def counted() -> list[int]:
        with Uploads() as uploads:
            order = compact()
        counts.append(uploads.count)
        return order

    engine._compact = counted  # type: ignore[method-assign]
    engine.submit(request(f"{i}", [3 + i, 4, 5], 3 if i == 1 else 9, seed=i) for i in range(5))
    engine.poll(wait_all=True)
    assert max(counts) == 1, "no row had to move, or each block took its own"


@pytest.mark.parametrize("memory", ["window", "transcript"])
def test_prompts_on_a_gpu_come_in_as_many_shapes_as_waves(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counts, the tokens and the scores of a rollout that believes it is on a GPU."""
    shapes, run = [], SlotModel._run

    def recorded(model: SlotModel, ids: Tensor, positions: Tensor, last: Tensor, read: int) -> Any:
        shapes.append((*ids.shape, read))
        return run(model, ids, positions, last, read)

    def pads(model: SlotModel, *arguments: Any) -> None:
        make(model, *arguments)
        model.few_shapes = True

    make = SlotModel.__init__
    monkeypatch.setattr(SlotModel, "_run", recorded)
    policy = SimpleNamespace(causal_lm=make_model())
    play(policy, memory, slots=18, wait_all=False, turns=6)
    ragged = [shape for shape in shapes if shape[1] > 1]
    shapes.clear()
    monkeypatch.setattr(SlotModel, "__init__", pads)
    play(policy, memory, slots=18, wait_all=False, turns=6)  # holds every score to its own pass
    few = [shape for shape in shapes if shape[1] > 1]
    assert len(set(few)) < 12 < len(set(ragged))
    assert {width % 64 for _, width, _ in few} == {0}
    assert {count for count, _, _ in few} <= {1, 2, 4, 8, 16, 18}
    # Hardly anything is saved on a few rows by a pass for four at least.
    fours = sum(min(18, doubled(count, 4)) * widened(width) for count, width, _ in ragged)
    assert sum(count * width for count, width, _ in few) < 0.8 * fours


def test_keys_and_values_that_do_not_fit_end_without_a_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = SimpleNamespace(causal_lm=make_model())
    engine = SlotEngine(slots=8, max_length=100)
    engine.sync(policy, 0)
    engine.submit([request("a", [1, 2], 2)])
    engine.poll(wait_all=True)
    needed = engine._model.cache.nbytes  # two of everything, two layers, two heads of 8 float32
    assert needed == 2 * 2 * 2 * 8 * 4 * 8 * 100
    assert engine.release() is False  # of a CPU's memory
    monkeypatch.setattr(slot_model, "free_bytes", lambda device: needed // 2)
    with pytest.raises(MemoryError, match=r"concurrency=4 or max_context=50$"):
        engine.sync(policy, 1)
    monkeypatch.setattr(slot_model, "free_bytes", lambda device: needed)
    engine.sync(policy, 1)


def test_logits_on_a_gpu_are_rounded_to_half_precision_first() -> None:
    for device, casts in (("cuda", 0), ("cpu", 1)):
        with FakeTensorMode():
            hidden, weight = (
                torch.empty(rows, 8, device=device, dtype=torch.bfloat16) for rows in (4, 16)
            )
            with Casts() as counts:
                logits = wide_product(hidden, weight)
        assert (logits.dtype, logits.shape) == (torch.float32, (4, 16))
        assert counts.casts == casts


def test_an_engine_outlives_its_release() -> None:
    engine = SlotEngine(slots=4, max_length=64)
    engine.sync(SimpleNamespace(causal_lm=make_model()), 0)
    model = weakref.ref(engine._model)
    cache = weakref.ref(engine._model.cache)
    gc.disable()
    try:
        engine.release()
        assert model() is cache() is None
    finally:
        gc.enable()
    with pytest.raises(RuntimeError, match="call sync"):
        engine.submit([])


def test_an_update_halves_though_keys_and_values_can_go() -> None:
    held, tried = [True, False], []

    def work(micro: Any) -> int:
        tried.append([*micro])
        if len(tried) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return len(tried[-1])

    budget = TokenBudget(64, packed=True, release=lambda: held.pop(0))
    assert budget.run(work, range(4), torch.full((4,), 16)) == 2
    assert [len(micro) for micro in tried] == [1, 1, 2]
    assert budget.tokens == 32
