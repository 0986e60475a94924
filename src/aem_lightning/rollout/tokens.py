"""Text to token ids, where only the text of templates may become control tokens.

Control tokens are the tokenizer's special tokens, and those added ones that the chat template
writes. Other added tokens are vocabulary, whoever writes them.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from aem_lightning.rollout.prompt import Piece

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_MARK = re.compile(r"[^\w\s]")  # what a word has not


class TextTokens:
    """The ids of texts that are partly a template's and partly content.

    Text is tokenised as ever, all pieces at once; only where that makes control tokens of content
    is it done again by a twin of the tokenizer, in which control tokens have names that nobody can
    write.

    Args:
        tokenizer: A Hugging Face tokenizer.
        written: All that the chat template may write: added tokens in it are control tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, written: str) -> None:
        self._tokenizer = tokenizer
        special = set(tokenizer.all_special_ids)
        self._control = {
            number: token.content
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special
            or number in special
            or (token.content in written and _MARK.search(token.content))
        }
        # Unknown words may come to a special token, which is control only where it is more.
        unknown = tokenizer.unk_token
        others = (None, tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token)
        self._unknown = None if unknown in others or unknown in written else unknown
        self._template_text = lru_cache(maxsize=1024)(self._read_template_text)

    def encode(self, pieces: Sequence[Piece]) -> list[int]:
        """The ids of ``pieces``, one after the other; content gives no control token."""
        text = "".join(piece.text for piece in pieces)
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        templates = [piece.text for piece in pieces if not piece.is_content]
        expected = [number for text in templates for number in self._template_text(text)[0]]
        if self._controls(ids) == expected and not self._spells_unknown(pieces):
            return ids
        if not self._tokenizer.is_fast:
            return [number for piece in pieces for number in self._encode_alone(piece)]
        renamed = (p.text if p.is_content else self._template_text(p.text)[1] for p in pieces)
        return list(self._twin.encode("".join(renamed), add_special_tokens=False).ids)

    def controls(self, text: str) -> list[int]:
        """The control tokens in a template's ``text``."""
        return self._template_text(text)[0]

    def _spells_unknown(self, pieces: Iterable[Piece]) -> bool:
        name = self._unknown
        return name is not None and any(p.is_content and name in p.text for p in pieces)

    def _controls(self, ids: Iterable[int]) -> list[int]:
        return [n for n in ids if n in self._control and self._control[n] != self._unknown]

    def _encode_alone(self, piece: Piece) -> list[int]:
        ids: list[int] = self._tokenizer(
            piece.text, add_special_tokens=False, split_special_tokens=piece.is_content
        ).input_ids
        return ids

    def _read_template_text(self, text: str) -> tuple[list[int], str]:
        """The control tokens in ``text``, and the text with the names that the twin knows."""
        if not self._tokenizer.is_fast:
            return self._controls(self._tokenizer(text, add_special_tokens=False).input_ids), text
        read = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = zip(read.input_ids, read.offset_mapping, strict=True)
        found = [(number, span) for number, span in spans if self._controls([number])]
        renamed = text
        for number, (start, end) in reversed(found):
            renamed = renamed[:start] + self._names[self._control[number]] + renamed[end:]
        return [number for number, _ in found], renamed

    @cached_property
    def _names(self) -> dict[str, str]:
        """What the twin calls each control token: a name that no content can foresee."""
        secret = secrets.token_hex(8)
        return {text: f"\U000f0000{secret}-{n}\U000f0001" for n, text in self._control.items()}

    @cached_property
    def _twin(self) -> Tokenizer:
        """The tokenizer with other names for its control tokens, the ids as they are."""
        from tokenizers import Tokenizer

        backend: Any = self._tokenizer
        state = json.loads(backend.backend_tokenizer.to_str())
        names, model = self._names, state["model"]
        for token in state["added_tokens"]:
            # Names are looked for in the raw text: a normaliser might change them.
            token["normalized"] &= token["content"] not in names
            token["content"] = names.get(token["content"], token["content"])
        model["vocab"] = _renamed(model["vocab"], names)
        if unknown := model.get("unk_token"):
            model["unk_token"] = names.get(unknown, unknown)
        if "merges" in model:
            model["merges"] = [pair for pair in model["merges"] if not _spells(pair, names)]
        return Tokenizer.from_str(json.dumps(state | {"truncation": None, "padding": None}))


def _renamed(vocabulary: Any, names: dict[str, str]) -> Any:
    """A model's tokens under their new names; to ids, or in a list with their scores."""
    if isinstance(vocabulary, dict):
        return {names.get(token, token): number for token, number in vocabulary.items()}
    return [[names.get(token, token), score] for token, score in vocabulary]


def _spells(pair: Sequence[str] | str, names: dict[str, str]) -> bool:
    """Whether a merge makes or takes a control token."""
    parts = pair.split(" ") if isinstance(pair, str) else list(pair)
    return any(token in names for token in (*parts, "".join(parts)))
