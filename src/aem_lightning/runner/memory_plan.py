"""Memory told before it is spent: what a run takes at most, what there is, and what to lower."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from transformers import Qwen2Config

from aem_lightning.modules import Architecture, uses_gpu
from aem_lightning.modules.footprint import FOUR_BITS, Footprint, optimizer_bytes
from aem_lightning.runner import ranks
from aem_lightning.runner.build import instantiate, lora_of, model_to_load, plain
from aem_lightning.runner.checks import refuse
from aem_lightning.runner.known_models import config_of, parameters_by_name
from aem_lightning.runner.next_steps import train_instead
from aem_lightning.runner.trainers import precision_of, stored_dtype

log = logging.getLogger(__name__)

SHARE = 0.85  # of what is free, for what `auto` chooses: the rest is prompts, kernels, fragments
# Of keys and values and of an update, at most: what a run surely comes to. Not all episodes get as
# long as they may, and a micro-batch halves by itself.
SURE = 0.5
MOST_TOKENS = 65536  # of a micro-batch: a larger one is no faster
VOCABULARY = 8192  # of a tiny policy, whose words are those of games that are not made yet
# What may run where a run does not, in the order of what it changes.
INSTEAD: tuple[Mapping[str, Any], ...] = (
    {"concurrency": "auto"},
    {"concurrency": "auto", "policy.quantization": "nf4"},
    {
        "concurrency": "auto",
        "policy.model": "Qwen/Qwen2.5-7B-Instruct",
        "policy.quantization": "nf4",
    },
    {"concurrency": "auto", "policy.model": "Qwen/Qwen2.5-1.5B-Instruct"},
)
SUPERVISED_INSTEAD: tuple[Mapping[str, Any], ...] = (
    {"policy.warm_start.batch_tokens": 4096},
    {"policy.warm_start.batch_tokens": 4096, "policy.model": "Qwen/Qwen2.5-1.5B-Instruct"},
)


@dataclass(frozen=True)
class Device:
    """Where a policy runs, and bytes of its memory."""

    kind: Literal["GPU", "machine"]
    free: int
    total: int


@dataclass(frozen=True)
class Plan:
    """Bytes at most, by what takes them: always, while episodes are played, and in an update.

    ``rollout`` and ``update`` are empty where nothing but the size of a model is known.
    """

    always: Mapping[str, float]
    rollout: Mapping[str, float]
    update: Mapping[str, float]

    def total(self) -> float:
        """All at once."""
        return sum(sum(part.values()) for part in (self.always, self.rollout, self.update))

    @property
    def sure(self) -> float:
        """What a run surely comes to; keys and values are given back before an update."""
        passing = max(sum(self.rollout.values()), sum(self.update.values()))
        return sum(self.always.values()) + SURE * passing


def planned(cfg: DictConfig, *, trains: bool = True) -> DictConfig:
    """``cfg`` with numbers for ``auto``; the plan is logged.

    From the config alone: no weight is read or fetched. Of ``stage=warm_start`` it is the plan of
    the supervised stage, in which an expert plays and no engine samples.

    Args:
        cfg: Of ``configs/train.yaml``.
        trains: Whether there are updates, else episodes alone.

    Raises:
        ConfigError: ``auto`` for a model of which nothing is known here.
        MemoryError: A run that surely does not fit, with the commands that do.
    """
    device, footprint = device_of(cfg), footprint_of(cfg)
    chosen = choose(cfg, footprint, device.free)
    if chosen:
        cfg = cfg.copy()
        for key, value in chosen.items():
            cfg[key] = value
    if footprint is None:
        told = "memory: the size of policy.model=%s cannot be known before it is loaded"
        log.info(told, cfg.policy.model)
        return cfg
    tokens, on_gpu = longest(cfg, OmegaConf.select(cfg, _budget(cfg))), device.kind == "GPU"
    plan = plan_of(cfg, footprint, cfg.concurrency, tokens, on_gpu=on_gpu, trains=trains)
    if ranks.rank() == 0:
        log.info("%s", shown(cfg, plan, device))
        for key, value in chosen.items():
            log.info("%s=auto: %s=%d", key, key, value)
    # A CPU's memory is paged: what is never touched is never there.
    sure = plan.sure if on_gpu else sum(plan.always.values())
    if trains and sure > device.total:
        raise MemoryError(_refusal(cfg, plan, device))
    return cfg


def device_of(cfg: DictConfig) -> Device:
    """The device of this rank, or the machine."""
    if uses_gpu(cfg.trainer.get("accelerator")):
        free, total = torch.cuda.mem_get_info()
        return Device("GPU", free, total)
    found = _meminfo()
    whole = found.get("MemTotal", 0) + found.get("SwapTotal", 0)
    return Device("machine", found.get("MemAvailable", 0), whole)


def footprint_of(cfg: DictConfig) -> Footprint | None:
    """What the memory of the policy of ``cfg`` goes by; ``None`` where nothing is known of it."""
    stored = stored_dtype(cfg, cfg.policy.dtype)
    kind = torch.bfloat16 if precision_of(cfg).startswith("bf16") else stored
    four_bits = cfg.policy.quantization is not None
    model = model_to_load(cfg)
    if model is None:
        shape = asdict(Architecture(**plain(cfg.policy.architecture)))
        shape.pop("rope_theta")
        config: Any = Qwen2Config(vocab_size=VOCABULARY, tie_word_embeddings=True, **shape)
    else:
        config = config_of(model)
    try:
        if config is not None:
            lora = None if model is None and _supervised(cfg) else lora_of(cfg)
            found = Footprint.before_loading(config, lora, stored, kind, four_bits=four_bits)
            if _has_values(cfg):  # a linear function of hidden states
                found = replace(found, trained=(*found.trained, int(config.hidden_size), 1))
            return found
    except Exception as error:  # what a family cannot do without its weights
        if "policy.lora." in str(error):
            raise
        log.debug("%s on meta: %r", model, error)
    numbers = parameters_by_name(str(model))
    if numbers is None:
        return None
    size = FOUR_BITS if four_bits else stored.itemsize
    return Footprint(int(numbers * size), (), None, 0, kind)


def plan_of(
    cfg: DictConfig,
    footprint: Footprint,
    slots: int,
    tokens: int,
    *,
    on_gpu: bool = True,
    trains: bool = True,
) -> Plan:
    """What a run of ``cfg`` takes with so many episodes at once, and tokens of a micro-batch."""
    always = {"weights": footprint.weights / _sharing(cfg), "adapters": float(footprint.adapters)}
    if _supervised(cfg) and not footprint.weights:  # a tiny model, all of which trains
        always = {"weights": always.pop("adapters")}
    rollout: dict[str, float] = {}
    update: dict[str, float] = {}
    known, samples = footprint.config is not None, not _supervised(cfg)
    if known and samples and not str(cfg.engine.get("_target_")).endswith("VllmEngine"):
        rollout["keys and values"] = footprint.key_values(slots, cfg.max_context)
        if on_gpu and cfg.engine.get("cuda_graphs") == "auto":
            rollout["CUDA graphs"] = footprint.graphs(slots)
    if trains:
        always["gradients"] = float(footprint.adapters)
        always["optimizer states"] = _optimizer(cfg, footprint)
    if trains and known:
        checkpointed = bool(cfg.policy.gradient_checkpointing)
        update["activations"] = footprint.activations(tokens, checkpointed=checkpointed)
        update["head chunks"] = footprint.head(tokens)
    return Plan(always, rollout, update)


def choose(cfg: DictConfig, footprint: Footprint | None, free: float) -> dict[str, int]:
    """Numbers for ``micro_batch_tokens=auto`` and ``concurrency=auto``, of ``free`` bytes.

    Half of what the policy leaves is for an update, what that does not take for episodes.

    Raises:
        ConfigError: Nothing is known of the model.
    """
    wanted = [key for key in ("micro_batch_tokens", "concurrency") if cfg[key] == "auto"]
    if not wanted:
        return {}
    if footprint is None or footprint.config is None:
        why = f"how large {cfg.policy.model} is cannot be known before it is loaded"
        refuse([f"{key}=auto: {why}. Type a number, e.g. {key}=64" for key in wanted])
    assert footprint is not None
    found: dict[str, int] = {}
    episodes = cfg.tasks_per_iteration * cfg.group_size
    one, two = (plan_of(cfg, footprint, 1, tokens) for tokens in (MOST_TOKENS, 2 * MOST_TOKENS))
    room = SHARE * free - sum(one.always.values())
    tokens = cfg.micro_batch_tokens
    if tokens == "auto":
        each = (two.total() - one.total()) / MOST_TOKENS
        fit = (room / 2 - one.update["head chunks"]) / each
        largest = max(cfg.max_context, episodes * cfg.max_context // cfg.num_minibatches)
        tokens = max(1, int(min(fit, largest, MOST_TOKENS)))
        found["micro_batch_tokens"] = tokens = tokens // 256 * 256 or tokens
    if cfg.concurrency == "auto":
        update = plan_of(cfg, footprint, 1, longest(cfg, tokens)).update
        each, left = sum(one.rollout.values()), room - sum(update.values())
        found["concurrency"] = max(1, int(min(episodes, left / each if each else episodes)))
    return found


def longest(cfg: DictConfig, tokens: int) -> int:
    """Tokens of the largest micro-batch: one row may be longer than the budget."""
    return max(tokens, int(cfg.max_context))


def shown(cfg: DictConfig, plan: Plan, device: Device) -> str:
    """The plan as a table, and the first setting to lower."""
    table = Table(title="memory at most, GB")
    table.add_column("what")
    table.add_column("GB", justify="right")
    table.add_column("goes by")
    by = {
        "weights": f"policy.model, policy.dtype={cfg.policy.dtype}, policy.quantization",
        "adapters": f"policy.lora.r={cfg.policy.lora.r}" + (", value head" * _has_values(cfg)),
        "gradients": "what trains",
        "optimizer states": "what trains, " + ("AdamW" if _supervised(cfg) else "optimizer"),
        "keys and values": f"concurrency={cfg.concurrency}, max_context={cfg.max_context}",
        "CUDA graphs": f"concurrency={cfg.concurrency}",
        "activations": f"{_budget(cfg)}={OmegaConf.select(cfg, _budget(cfg))}, "
        f"policy.gradient_checkpointing={str(cfg.policy.gradient_checkpointing).lower()}",
        "head chunks": "the vocabulary",
    }
    for part in (plan.always, plan.rollout, plan.update):
        for name, size in part.items():
            table.add_row(name, f"{size / 1e9:.2f}", by[name])
    table.add_section()
    if not plan.rollout and not plan.update:
        table.add_row("the rest", "?", "not known before the model's config is here")
    table.add_row("all at once", f"{plan.total() / 1e9:.2f}", "")
    has = f"{device.free / 1e9:.2f}"
    table.add_row(f"free, of this {device.kind}", has, f"{device.total / 1e9:.2f} in all")
    file = io.StringIO()
    Console(file=file, width=100).print(table)
    over = plan.total() > device.free
    when = "It may not fit" if over else "Should it run out"
    return f"memory plan:\n{file.getvalue()}{when}: lower {first_to_lower(cfg, plan, device)} first"


def first_to_lower(cfg: DictConfig, plan: Plan, device: Device) -> str:
    """The setting that most memory goes by among those that change no result, and a number."""
    left = device.free - sum(plan.always.values())
    rollout, update = sum(plan.rollout.values()), sum(plan.update.values())
    if left <= 0 or not rollout + update:
        return "the policy (policy.quantization=nf4, a smaller policy=...)"
    if rollout >= update:
        fits = int(max(left - update, left / 2) / (rollout / cfg.concurrency))
        if cfg.concurrency > 1:
            return f"concurrency={max(1, min(fits, cfg.concurrency // 2))}"
    elif (tokens := OmegaConf.select(cfg, _budget(cfg))) > cfg.max_context:
        held = max(left - rollout, left / 2) / (update / tokens)
        return f"{_budget(cfg)}={max(1, int(min(held, tokens // 2)))}"
    elif not cfg.policy.gradient_checkpointing:
        return "policy.gradient_checkpointing=true"
    return f"max_context={cfg.max_context // 2}"


def _refusal(cfg: DictConfig, plan: Plan, device: Device) -> str:
    parts = {**plan.always, **plan.rollout, **plan.update}
    largest = sorted(parts, key=lambda name: -parts[name])[:3]
    told = ", ".join(f"{name} {parts[name] / 1e9:.1f}" for name in largest)
    commands = [*_that_run(cfg, device)]
    return "\n  ".join(
        [
            f"policy.model={cfg.policy.model} does not fit: at these settings the run takes up to "
            f"{plan.total() / 1e9:.1f} GB (the largest parts, in GB: {told}), and this "
            f"{device.kind} has {device.total / 1e9:.1f} GB. Nothing was fetched or loaded. "
            + ("What does run here:" if commands else "Type a smaller policy=..."),
            *commands,
        ]
    )


def _that_run(cfg: DictConfig, device: Device) -> Iterator[str]:
    """Commands whose plans fit, and the one for more GPUs."""
    for changes in SUPERVISED_INSTEAD if _supervised(cfg) else INSTEAD:
        other = cfg.copy()
        for key, value in changes.items():
            OmegaConf.update(other, key, value)
        footprint = footprint_of(other)
        if footprint is None or footprint.config is None:
            continue
        slots = choose(other, footprint, device.total).get("concurrency", 1)
        tokens = longest(other, OmegaConf.select(other, _budget(other)))
        if plan_of(other, footprint, slots, tokens).total() <= device.total:
            yield train_instead(cfg, changes)
    if not _supervised(cfg):
        command = train_instead(cfg, {"trainer": "fsdp", "engine": "vllm"})
        yield f"with several GPUs, and a vLLM server on others: {command}"


def _supervised(cfg: DictConfig) -> bool:
    return bool(cfg.stage == "warm_start")


def _budget(cfg: DictConfig) -> str:
    """The key that says how many tokens one pass forward and backward has."""
    return "policy.warm_start.batch_tokens" if _supervised(cfg) else "micro_batch_tokens"


def _has_values(cfg: DictConfig) -> bool:
    """Whether a value head is trained beside the adapters."""
    return not _supervised(cfg) and str(cfg.advantage.get("_target_")).endswith(".PPO")


def _optimizer(cfg: DictConfig, footprint: Footprint) -> float:
    try:
        make = torch.optim.AdamW if _supervised(cfg) else instantiate(cfg.optimizer)
        return optimizer_bytes(make, footprint.trained)
    except Exception as error:  # one that cannot be made is told of by `check_parts`
        log.debug("%r", error)
        return 0.0


def _sharing(cfg: DictConfig) -> int:
    """GPUs that share the weights."""
    if "fsdp" not in str(cfg.trainer.get("strategy")):
        return 1
    devices = cfg.trainer.get("devices")
    return devices if isinstance(devices, int) and devices > 0 else torch.cuda.device_count() or 1


def _meminfo() -> dict[str, int]:
    """What Linux says of the machine's memory, in bytes."""
    file = Path("/proc/meminfo")
    lines = file.read_text(encoding="ascii").splitlines() if file.is_file() else []
    pairs = (line.split(":") for line in lines)
    return {name: 1024 * int(value.split()[0]) for name, value in pairs}
