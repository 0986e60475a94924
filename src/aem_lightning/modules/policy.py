"""The policy: a Hugging Face causal LM with LoRA adapters, and what training asks of it."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from aem_lightning.functional import logprob_entropy_through, token_logprob_entropy
from aem_lightning.modules.attention import packed_hidden
from aem_lightning.modules.lora import base_digest, merged_copy, peft_config
from aem_lightning.modules.settings import Lora
from aem_lightning.modules.sharding import hollow_model
from aem_lightning.modules.value import ValueHead
from aem_lightning.rollout.head import Head

DTYPES = ("auto", "float32", "bfloat16", "float16")


class Policy(nn.Module):
    """A causal LM, its tokenizer, and (for reinforcement learning) its LoRA adapters.

    Args:
        model: The causal LM; it is frozen when ``lora`` is given.
        tokenizer: Its tokenizer.
        lora: Adapter settings; ``None`` trains every weight (the warm start of a tiny model).
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lora: Lora | None = None
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        if tokenizer is not None:  # else nothing is written or read, only scored
            ends = getattr(model.generation_config, "eos_token_id", None)
            # Where encoders find them: a tokenizer knows of one end token alone.
            tokenizer.generation_end_ids = ends if isinstance(ends, list) else [ends]
        self.causal_lm: PreTrainedModel = model
        self.peft: PeftModel | None = None
        if lora is not None:
            try:
                self.peft = get_peft_model(model, peft_config(lora, model))
            except ValueError as error:  # layers that the model has not, or that take no adapter
                targets = lora.target_modules
                raise ValueError(f"policy.lora.target_modules={targets}: {error}") from error
            base = self.peft.get_base_model()
            assert isinstance(base, PreTrainedModel)
            self.causal_lm = base
        self.causal_lm.config.use_cache = False
        self.head = Head(self.causal_lm)
        self.value_head: ValueHead | None = None
        self.sharded = False  # its weights are spread over ranks
        self.shard_group: Any = None  # those ranks, once they have read them

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        lora: Lora | Mapping[str, Any] | None = None,
        dtype: str = "float32",
        quantization: Literal["nf4"] | None = None,
        chat_template: str | None = None,
        gradient_checkpointing: bool = False,
        attn_implementation: str | None = None,
        sharded: bool = False,
    ) -> Self:
        """A policy from the hub or from a local folder.

        Args:
            model: Hub name or folder.
            lora: Adapter settings, or ``None`` to train every weight.
            dtype: Storage type of the frozen weights; adapters stay in float32. ``auto``: see
                `check_dtype`.
            quantization: ``nf4`` loads 4-bit weights through ``BitsAndBytesConfig`` (extra
                ``quant``).
            chat_template: A Jinja template in place of the tokenizer's own.
            gradient_checkpointing: Trade time for memory in the update.
            attn_implementation: Passed to transformers; ``None`` is its choice: ``sdpa``, but for
                models whose attention has a soft cap or sinks.
            sharded: No weight is read yet: `aem_lightning.modules.sharding.shard` spreads them over
                ranks.

        Raises:
            FileNotFoundError: The model is not there; says how to fetch it and how to run without
                it.
            ValueError: The model is of code that comes with it, or an option is unknown.
        """
        if quantization not in (None, "nf4"):
            raise ValueError(
                f"policy.quantization={quantization!r} is unknown; allowed: null, nf4."
            )
        stored = check_dtype(dtype)
        settings: dict[str, Any] = {"dtype": stored}
        if attn_implementation is not None:
            settings["attn_implementation"] = attn_implementation
        if quantization:
            settings |= {"quantization_config": _four_bit(stored), "device_map": _own_gpu()}
        try:
            tokenizer = load_tokenizer(model)
            with _without_its_code(model):
                if sharded:
                    causal_lm = hollow_model(model, **settings)
                else:
                    causal_lm = AutoModelForCausalLM.from_pretrained(
                        model, trust_remote_code=False, **settings
                    )
        except OSError as error:
            raise FileNotFoundError(
                f"The model {model!r} is neither a folder here nor reachable on the Hugging Face "
                f"hub.\n  fetch it:        hf download {model}\n"
                "  or a local copy: python train.py ... policy.model=/path/to/folder\n"
                "  or without it:   python train.py ... policy=tiny datamodule=alfworld_generated"
            ) from error
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        if quantization:
            # And no more: PEFT's own preparation makes embeddings and head float32, and every pass
            # would cast the head back.
            causal_lm.requires_grad_(False)
        if gradient_checkpointing:
            _checkpoint_layers(causal_lm)
        if isinstance(lora, Mapping):
            lora = Lora(**lora)
        policy = cls(causal_lm, tokenizer, lora)
        policy.sharded = sharded
        return policy

    def score(
        self,
        input_ids: Tensor,
        mask: Tensor,
        temperature: float = 1.0,
        lengths: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of the masked tokens, given all tokens to their left.

        Args:
            input_ids: [B, L], padded on the right (causal attention never looks there); with
                ``lengths`` one packed row [1, sum of lengths].
            mask: Bool, of the same shape; True at the T tokens to score, never at the first token
                of a sequence.
            temperature: Sampling temperature; 0 (greedy) is scored at 1, as engines report it.
            lengths: Tokens of each sequence of a packed row; none sees another.

        Returns:
            Log-probabilities [T] and full-vocabulary entropies [T] in nats, float32, row by row.
        """
        hidden = self.hidden_states(input_ids, mask, lengths)
        return self.score_hidden(hidden, input_ids[:, 1:][mask[:, 1:]], temperature)

    def hidden_states(
        self, input_ids: Tensor, mask: Tensor, lengths: Sequence[int] | None = None
    ) -> Tensor:
        """Last hidden states that predict the masked tokens, [T, d]; arguments as for `score`.

        Raises:
            ValueError: Its weights are to be spread over ranks, and there are none yet.
        """
        if self.sharded and self.shard_group is None:
            raise ValueError(
                "trainer.strategy=fsdp2: weights are read where a trainer runs, and nothing else "
                "computes with them. Type trainer.strategy=auto"
            )
        if lengths is None:
            hidden: Tensor = self.head.decoder(
                input_ids=input_ids, use_cache=False
            ).last_hidden_state
        else:
            hidden = packed_hidden(self.causal_lm, input_ids, lengths)
        return hidden[:, :-1][mask[:, 1:]]  # the hidden state left of a token predicts it

    def score_hidden(
        self, hidden: Tensor, targets: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies, [T] each, of ``targets`` [T] after `hidden_states`."""
        weight = self.head.weight  # [V, d]
        if weight is None:
            return logprob_entropy_through(self.head.logits, hidden, targets, temperature or 1.0)
        return token_logprob_entropy(hidden, weight, targets, temperature or 1.0)

    def add_value_head(self) -> None:
        """Give the policy a value head, which trains and is saved with the adapters."""
        if self.value_head is None:
            ids = torch.zeros(1, 2, dtype=torch.long, device=self.causal_lm.device)
            with (
                torch.no_grad(),
                torch.random.fork_rng(devices=[]),
            ):  # dropout draws, if there is some
                width = self.hidden_states(ids, torch.ones_like(ids, dtype=torch.bool)).shape[1]
            self.value_head = ValueHead(width).to(self.causal_lm.device)

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """The reference policy, without a second model: inside, the adapters are off."""
        if self.peft is None:
            raise RuntimeError(
                "A policy without LoRA has no reference; set policy.lora or loss.kl_coef=0."
            )
        with self.peft.disable_adapter():
            yield

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that require a gradient, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @functools.cached_property
    def base_digest(self) -> str | None:
        """`base_digest` of what is frozen: the same for as long as the policy lives."""
        return base_digest(self.causal_lm)

    def save_adapter(self, folder: str | Path) -> None:
        """Write adapter and tokenizer: a folder for ``PeftModel.from_pretrained(base, folder)``."""
        if self.peft is None:
            raise RuntimeError("A policy without LoRA has no adapter; use save_model.")
        # An adapter on the head has the head's own weights beside it, which no one has changed.
        self.peft.save_pretrained(str(folder), save_embedding_layers=False)
        self.tokenizer.save_pretrained(str(folder))
        _share(Path(folder))

    def save_model(self, folder: str | Path) -> None:
        """Write the whole model, adapters merged into a float32 copy of it, as a model folder."""
        model = self.causal_lm if self.peft is None else merged_copy(self.causal_lm)
        model.config.use_cache = True
        model.save_pretrained(str(folder))
        self.causal_lm.config.use_cache = False
        self.tokenizer.save_pretrained(str(folder))
        _share(Path(folder))


def _share(folder: Path) -> None:
    """Let read whom the umask lets read: a server may run under another account.

    safetensors writes for the owner alone, and so does ``mkdtemp``.
    """
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for file in folder.iterdir():
        file.chmod((0o777 if file.is_dir() else 0o666) & ~umask)


def _checkpoint_layers(model: PreTrainedModel) -> None:
    """Let the layers of ``model`` be computed again in the backward pass.

    They are in training mode alone, which a loaded model is not in, and which nobody puts it into:
    the layers themselves are then, and their dropout, if they have some, stays off.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer as it was saved.

    ``AutoTokenizer`` goes by the model's architecture and rebuilds a Qwen2 tokenizer around any
    vocabulary, which would cut the tiny policy's words into bytes; a generic tokenizer says so in
    its own config.
    """
    generic = get_tokenizer_config(model).get("tokenizer_class")
    tokenizer: PreTrainedTokenizerBase
    if generic in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
        return tokenizer
    with _without_its_code(model):
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    return tokenizer


@contextlib.contextmanager
def _without_its_code(model: str) -> Iterator[None]:
    """Say what to do where transformers would ask whether to run code that ``model`` brings."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{model} comes with code of its own, and weights are data: nothing that lies beside "
            "them is run. Give a model of an architecture that transformers itself has"
        ) from error


def uses_gpu(accelerator: str | None) -> bool:
    """Whether a trainer with this ``accelerator`` computes on a GPU of this machine."""
    return accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def check_dtype(name: str, accelerator: str | None = "auto") -> torch.dtype:
    """The storage type of frozen weights that ``name`` means under the trainer's ``accelerator``.

    ``auto`` is bfloat16 on a GPU and on a processor that multiplies it in hardware (AMX, AVX-512's
    bf16), else float32: with AVX2 alone, a product in bfloat16 took three to six times as long.

    Raises:
        ValueError: It is none of those that weights are stored in.
    """
    if name not in DTYPES:
        raise ValueError(f"policy.dtype={name!r} is unknown; allowed: {', '.join(DTYPES)}.")
    if name == "auto":
        able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # of torch 2.10
        is_fast = any(able.get(unit) for unit in ("amx_bf16", "avx512_bf16"))
        name = "bfloat16" if uses_gpu(accelerator) or is_fast else "float32"
    found: torch.dtype = getattr(torch, name)
    return found


def _own_gpu() -> dict[str, int] | None:
    """Where 4-bit weights are made: on this rank's GPU; else all pass through the first one.

    Whoever starts ranks says the number of each.
    """
    if not torch.cuda.is_available():
        return None
    return {"": int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()}


def _four_bit(compute_dtype: torch.dtype) -> Any:
    try:
        import bitsandbytes  # noqa: F401  (transformers reports its absence far less clearly)
    except ImportError:
        raise ImportError(
            "policy.quantization=nf4 needs bitsandbytes: pip install 'aem-lightning[quant]', "
            "or type policy.quantization=null"
        ) from None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
