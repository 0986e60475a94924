"""A small policy from nothing: a random Qwen2 model, and a tokenizer that loses nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from aem_lightning.modules.settings import Architecture

END, PAD, UNKNOWN = "<|end|>", "<|pad|>", "<|unknown|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
TAGS = ("<think>", "</think>", "<action>", "</action>")
CHAT_TEMPLATE = (
    "{% for tool in tools or () %}{% if loop.first %}<|system|>{% endif %}{{ tool.function.name }}("
    "{{ tool.function.parameters.properties | join(', ') }}): {{ tool.function.description }}\n"
    "{% endfor %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}" + END + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# A word, or a run of other marks, with the blanks before it: so blanks cost no tokens.
SPACED_WORD = r"\s*\w+|\s*[^\w\s]+|\s+"
# More would make a small model's head most of its work: a catalogue of products has 38,000 words.
MOST_TOKENS = 8192


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a chat template: ``decode(encode(x)) == x`` for every text.

    What it knows as one token are the words of ``texts``, with the blanks before them; any other
    word is spelled in bytes. Where these would be more than `MOST_TOKENS`, it is BPE trained on
    ``texts``, and rare words are pieces.
    """
    texts = [*texts]
    known = set(texts)
    known |= {text.strip() for text in known}  # as messages are
    # Texts may be bare lists of words, which sentences have behind a blank.
    known |= {f" {word}" for text in known for word in re.findall(r"\w+", text)}
    cut = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPACED_WORD), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    words = {word for text in known for word, _ in cut.pre_tokenize_str(text)}
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    special = [PAD, UNKNOWN, END, *ROLES]
    names = [*special, *sorted(alphabet), *sorted(words - alphabet)]
    if len(names) <= MOST_TOKENS:
        vocabulary = {name: number for number, name in enumerate(names)}
        # Without merges: a word is one token, or bytes.
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
        tokenizer.pre_tokenizer = cut
    else:
        trainer = trainers.BpeTrainer(
            vocab_size=MOST_TOKENS,
            special_tokens=special,
            initial_alphabet=sorted(alphabet),
            show_progress=False,
        )
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = cut
        tokenizer.train_from_iterator(texts, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
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
