"""A policy whose frozen weights are spread over ranks: FSDP2, a decoder layer a unit.

What trains is whole on every rank, as in data-parallel training: adapters are a hundredth of the
weights, their gradients are summed once an optimizer step, and rank 0 can write a checkpoint or
hand the adapter to a server without the others. So are embeddings, last norm and head.

A frozen weight has no gradient to sum. Ranks that hold one copy of the weights meet to collect a
layer, and nowhere else; other copies, of other machines, never take part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files


def hollow_model(model: str, **settings: Any) -> PreTrainedModel:
    """The frozen causal LM ``model`` without its weights: each is one number, seen many times.

    PEFT can put adapters on it, and draws them as it would on the model itself; it computes nothing
    before `shard`. ``settings`` are those of ``from_pretrained``.

    Raises:
        OSError: The model is not there.
    """
    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **settings)
    hollow: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay tied
    for module in causal_lm.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                one = torch.zeros((), dtype=weight.dtype, device="cpu").expand(weight.shape)
                kept = hollow.setdefault(weight, nn.Parameter(one, requires_grad=False))
                module._parameters[name] = kept
        buffers = {
            n: torch.empty_like(b, device="cpu")
            for n, b in module._buffers.items()
            if b is not None
        }
        if buffers:  # rotations, which no file holds
            module._buffers.update(buffers)
            causal_lm._init_weights(module)
    with suppress(OSError):
        causal_lm.generation_config = GenerationConfig.from_pretrained(model)
    found: PreTrainedModel = causal_lm.eval()
    return found


def shard(policy: Any, mesh: DeviceMesh | None) -> None:
    """Give a hollow ``policy`` its weights: of each decoder layer, this rank's part.

    A layer is read, cut and let go before the next one, so a rank never holds more than its part
    and one layer. Any other policy, and one that has its weights, stays as it is.

    Args:
        policy: The policy, with its adapters.
        mesh: Lightning's, of two dimensions: copies of the weights, and ranks that share a copy.

    Raises:
        ValueError: The files have not the weights of the model.
    """
    if not policy.sharded or policy.shard_group is not None:
        return
    assert mesh is not None
    sharing = mesh[mesh.mesh_dim_names[-1]]  # type: ignore[index]
    causal_lm: PreTrainedModel = policy.causal_lm
    files = _weight_files(str(causal_lm.name_or_path))
    names = {parameter: name for name, parameter in causal_lm.named_parameters()}
    trained = {parameter for parameter in names if parameter.requires_grad}
    units = set(causal_lm._no_split_modules or ())
    layers = [m for m in policy.head.decoder.modules() if type(m).__name__ in units]
    if not layers:
        raise ValueError(
            f"trainer=fsdp: {type(causal_lm).__name__} does not say which of its modules are "
            "layers: type another policy.model=..., or trainer=ddp"
        )
    for layer in layers:
        for parameter in set(layer.parameters()) - trained:
            parameter.data = _read(files, names.pop(parameter), parameter)
        fully_shard(layer, mesh=sharing, reshard_after_forward=True, ignored_params=trained)
    whole = {parameter for parameter in causal_lm.parameters() if parameter in names}
    for parameter in whole - trained:
        parameter.data = _read(files, names[parameter], parameter)
    # The root: it has no weights of its own, and lets a layer be collected ahead of its turn.
    fully_shard(policy.head.decoder, mesh=sharing, ignored_params=whole)
    policy.shard_group = sharing.get_group()


def _weight_files(model: str) -> dict[str, str]:
    """The names of the weights of ``model``, and the safetensors file that holds each."""
    try:
        index = cached_file(model, SAFE_WEIGHTS_INDEX_NAME)
        files, _ = get_checkpoint_shard_files(model, index)
    except OSError:  # one file
        files = [cached_file(model, SAFE_WEIGHTS_NAME)]
    found: dict[str, str] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    return found


def _read(files: Mapping[str, str], name: str, like: Tensor) -> Tensor:
    """The weight ``name``, maybe of a ``base_layer`` of PEFT's, in the type of ``like``."""
    name = name.replace(".base_layer.", ".")
    found: Tensor | None = None
    if name in files:
        with safe_open(files[name], "pt") as opened:
            found = opened.get_tensor(name)
    if found is None or found.shape != like.shape:
        raise ValueError(
            f"trainer=fsdp: the model's files hold {'no' if found is None else tuple(found.shape)} "
            f"{name}, and its config wants {tuple(like.shape)}; they are read as they are: save "
            "the model anew with save_pretrained, or type trainer=ddp"
        )
    return found.to(like.dtype)


@contextmanager
def in_step(policy: Any, passes: int) -> Iterator[None]:
    """Around ``passes`` passes of ``policy``: ranks that share it all make as many as the busiest.

    A layer is collected from all of them, and each has rows of its own. A pass that a rank lacks is
    one of two tokens, whose gradient is 0.
    """
    if policy.shard_group is None:
        yield
        return
    most = torch.tensor(passes, device=policy.causal_lm.device)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=policy.shard_group)
    yield
    ids = torch.zeros(1, 2, dtype=torch.long, device=most.device)
    for _ in range(int(most) - passes):
        hidden = policy.hidden_states(ids, torch.ones_like(ids, dtype=torch.bool))
        if hidden.requires_grad:
            (0.0 * hidden.sum()).backward()
