"""The policy: any Hugging Face causal LM with LoRA adapters, and what training asks of it."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from aem_lightning.functional import token_logprob_entropy
from aem_lightning.modules.attention import Segments, use_packed_attention
from aem_lightning.modules.settings import Lora
from aem_lightning.modules.value import ValueHead

FULL_PRECISION = torch.float32
DTYPES = ("float32", "bfloat16", "float16")


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
        self.causal_lm: PreTrainedModel = model
        self.peft: PeftModel | None = None
        if lora is not None:
            try:
                self.peft = get_peft_model(model, _peft_config(lora))
            except ValueError as error:  # layers that the model has not, or that take no adapter
                targets = lora.target_modules
                raise ValueError(f"policy.lora.target_modules={targets}: {error}") from error
            base = self.peft.get_base_model()
            assert isinstance(base, PreTrainedModel)
            self.causal_lm = base
        self.causal_lm.config.use_cache = False
        self.value_head: ValueHead | None = None

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
        attn_implementation: str = "sdpa",
    ) -> Self:
        """A policy from the hub or from a local folder.

        Args:
            model: Hub name or folder.
            lora: Adapter settings, or ``None`` to train every weight.
            dtype: Storage type of the frozen weights; adapters stay in float32.
            quantization: ``nf4`` loads 4-bit weights through ``BitsAndBytesConfig`` (extra
                ``quant``).
            chat_template: A Jinja template in place of the tokenizer's own.
            gradient_checkpointing: Trade time for memory in the update.
            attn_implementation: Passed to transformers.

        Raises:
            FileNotFoundError: The model is not there; says how to fetch it and how to run without
                it.
        """
        if quantization not in (None, "nf4"):
            raise ValueError(
                f"policy.quantization={quantization!r} is unknown; allowed: null, nf4."
            )
        stored = check_dtype(dtype)
        settings: dict[str, Any] = {"dtype": stored, "attn_implementation": attn_implementation}
        if quantization:
            settings["quantization_config"] = _four_bit(stored)
        try:
            tokenizer = load_tokenizer(model)
            causal_lm = AutoModelForCausalLM.from_pretrained(model, **settings)
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
            causal_lm = prepare_model_for_kbit_training(causal_lm, use_gradient_checkpointing=False)
        if gradient_checkpointing:
            _checkpoint_layers(causal_lm)
        if isinstance(lora, Mapping):
            lora = Lora(**lora)
        return cls(causal_lm, tokenizer, lora)

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
        """Last hidden states that predict the masked tokens, [T, d]; arguments as for `score`."""
        packed: dict[str, Any] = {}
        if lengths is not None:
            use_packed_attention(self.causal_lm)
            packed = Segments.of(lengths, input_ids.device).decoder_arguments()
        decoder = self.causal_lm.get_decoder()
        hidden: Tensor = decoder(input_ids=input_ids, use_cache=False, **packed).last_hidden_state
        return hidden[:, :-1][mask[:, 1:]]  # the hidden state left of a token predicts it

    def score_hidden(
        self, hidden: Tensor, targets: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies, [T] each, of ``targets`` [T] after `hidden_states`."""
        weight = self.causal_lm.get_output_embeddings().weight  # [V, d]
        return token_logprob_entropy(hidden, weight, targets, temperature or 1.0)

    def add_value_head(self) -> None:
        """Give the policy a value head, which trains and is saved with the adapters."""
        if self.value_head is None:
            width = self.causal_lm.get_output_embeddings().weight.shape[1]
            self.value_head = ValueHead(int(width)).to(self.causal_lm.device)

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

    def save_adapter(self, folder: str | Path) -> None:
        """Write adapter and tokenizer: a folder for ``PeftModel.from_pretrained(base, folder)``."""
        if self.peft is None:
            raise RuntimeError("A policy without LoRA has no adapter; use save_model.")
        self.peft.save_pretrained(str(folder))
        self.tokenizer.save_pretrained(str(folder))
        _share(Path(folder))

    def save_model(self, folder: str | Path) -> None:
        """Write the whole model, adapters merged into a float32 copy of it, as a model folder."""
        model = self.causal_lm if self.peft is None else _merged_copy(self.causal_lm)
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


def _peft_config(lora: Lora) -> LoraConfig:
    targets = lora.target_modules
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )


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


def check_adapters(expected: Mapping[str, torch.Size], state: Mapping[str, Tensor]) -> None:
    """Raise unless a checkpoint's ``state`` has exactly the names and shapes that are expected.

    Raises:
        ValueError: Naming the first difference.
    """
    found = {name: value.shape for name, value in state.items()}
    if dict(expected) != found:
        wrong = sorted(set(expected.items()) ^ set(found.items()), key=str)
        raise ValueError(
            f"The checkpoint's adapters do not fit this policy ({len(wrong)} differences, the "
            f"first: {wrong[0][0]} with shape {tuple(wrong[0][1])}). Use the policy and "
            "policy.lora settings that the checkpoint was trained with, and its advantage: that of "
            "algorithm=ppo has a value head of its own."
        )


def _merged_copy(causal_lm: PreTrainedModel) -> PreTrainedModel:
    """A float32 model with the adapters of ``causal_lm`` merged in.

    PEFT merges in place and, where weights have 4 bits, rounds the result to 4 bits again.
    """
    adapted: dict[str, Any] = {
        n: m for n, m in causal_lm.named_modules() if isinstance(m, LoraLayer)
    }
    state = {
        name: parameter.detach().to(FULL_PRECISION)
        for name, parameter in causal_lm.named_parameters()
        if not any(name.startswith(f"{layer}.") for layer in adapted)
    }
    for name, layer in adapted.items():
        base = layer.get_base_layer()
        base.state_dict()  # undoes the layout that bitsandbytes gives 4-bit weights to run on a CPU
        weight = dequantize_module_weight(base).detach().to(FULL_PRECISION)
        for adapter in layer.active_adapters:
            weight = weight + layer.get_delta_weight(adapter).detach()
        state[f"{name}.weight"] = weight
        if getattr(base, "bias", None) is not None:
            state[f"{name}.bias"] = base.bias.detach().to(FULL_PRECISION)
    config = copy.deepcopy(causal_lm.config)
    config.dtype = FULL_PRECISION
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = type(causal_lm)(config)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.generation_config = causal_lm.generation_config
    return model


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer as it was saved.

    ``AutoTokenizer`` goes by the model's architecture and rebuilds a Qwen2 tokenizer around any
    vocabulary, which would cut the tiny policy's words into bytes; a generic tokenizer says so in
    its own config.
    """
    generic = get_tokenizer_config(model).get("tokenizer_class")
    is_generic = generic in ("TokenizersBackend", "PreTrainedTokenizerFast")
    loader = PreTrainedTokenizerFast if is_generic else AutoTokenizer
    tokenizer: PreTrainedTokenizerBase = loader.from_pretrained(model)
    return tokenizer


def check_dtype(name: str) -> torch.dtype:
    """The storage type of frozen weights that ``name`` means.

    Raises:
        ValueError: It is none of those that weights are stored in.
    """
    if name not in DTYPES:
        raise ValueError(f"policy.dtype={name!r} is unknown; allowed: {', '.join(DTYPES)}.")
    found: torch.dtype = getattr(torch, name)
    return found


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
