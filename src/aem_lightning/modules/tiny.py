"""A small policy from nothing: a Qwen2 model with random weights, and a word-level tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from aem_lightning.modules.settings import Architecture

END, PAD, UNKNOWN = "<|end|>", "<|pad|>", "<|unknown|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
TAGS = ("<think>", "</think>", "<action>", "</action>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}" + END + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A lower-casing tokenizer with a chat template; its vocabulary is the words of ``texts``."""
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    special = [PAD, UNKNOWN, END, *ROLES]
    trainer = trainers.WordLevelTrainer(
        vocab_size=2**16, min_frequency=1, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(sorted(set(texts)), trainer)
    tokenizer.add_tokens(list(TAGS))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, unk_token=UNKNOWN
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_tiny_model(
    tokenizer: PreTrainedTokenizerFast, architecture: Architecture, seed: int
) -> Qwen2ForCausalLM:
    """A Qwen2 causal LM with random weights that depend on ``seed`` alone.

    The global random stream is left as it was.
    """
    shape = asdict(architecture)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        rope_parameters={"rope_type": "default", "rope_theta": shape.pop("rope_theta")},
        **shape,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)
