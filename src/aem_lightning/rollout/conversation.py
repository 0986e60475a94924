"""Chat messages as token ids and back: for conversations that were recorded, here or elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from aem_lightning.rollout import tool_call
from aem_lightning.rollout.prompt import THOUGHT, Piece
from aem_lightning.rollout.tokens import TextTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
"""A message of a chat: its ``role`` and its ``content``."""

_PROBES = 0xE000  # private use, as in the encoder
_MARKS = re.compile(f"({'|'.join(map(re.escape, tool_call.MARKS))})")


class ChatTemplate:
    """The chat template of a tokenizer, read both ways.

    Args:
        tokenizer: A Hugging Face tokenizer with a chat template.
        end_id: What closes a reply; needed for `ids`.
        kwargs: What the template is given beside the messages.

    Raises:
        ValueError: There is no chat template, or it refuses a plain conversation.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        end_id: int | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if not tokenizer.chat_template:
            raise ValueError(f"{tokenizer.name_or_path}: its tokenizer has no chat template")
        self._tokenizer, self._kwargs, self._end = tokenizer, dict(kwargs or {}), end_id
        self._around = lru_cache(maxsize=256)(self._make_around)
        self._heads, self._ends = self._read_marks()
        written = f"{tokenizer.get_chat_template()}{''.join(self._around(('user',)))}"
        self._tokens = TextTokens(tokenizer, written)

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt that ``messages`` make."""
        shown = [dict(message) for message in messages]
        text = self._tokenizer.apply_chat_template(
            shown, tokenize=False, add_generation_prompt=True, **self._kwargs
        )
        return str(text)

    def read(self, text: str) -> list[dict[str, str]]:
        """The messages of a prompt, as the model read it.

        Raises:
            ValueError: The template did not write ``text``.
        """
        found: list[dict[str, str]] = []
        for head, behind_system in self._heads:
            if not text.startswith(head):
                continue
            rest = text[len(head) :]
            if behind_system is not None:
                system, between, rest = rest.partition(behind_system)
                if not between:
                    continue
                found.append({"role": "system", "content": system})
            break
        else:
            raise ValueError(f"no prompt of this chat template: {text[:80]!r}...")
        role = "user"
        while rest:
            ends = self._ends["assistant" if role == "assistant" else "user"]
            places = [(at, -len(end), end) for end in ends if (at := rest.find(end)) >= 0]
            if not places:
                raise ValueError(f"no message of this chat template ends here: {rest[:80]!r}...")
            at, _, end = min(places)
            found.append({"role": role, "content": rest[:at]})
            rest, role = rest[at + len(end) :], ends[end]
        if role != "assistant":
            raise ValueError(f"the prompt does not ask for a reply: ...{text[-80:]!r}")
        return found

    def ids(self, messages: Sequence[Message], first: int = 0) -> tuple[list[int], list[bool]]:
        """The row of a conversation, and which of its tokens an assistant said.

        Ids are those that a rollout would have made of the same texts: prompts by the template, a
        reply by itself with its end token behind it. What comes behind the last reply is left out.

        Args:
            messages: Roles and contents.
            first: Replies before this message are a part of the prompt.

        Raises:
            ValueError: No reply, two without anything between them, or a template that refuses.
        """
        row: list[int] = []
        said: list[bool] = []
        start, end = 0, self._end
        if end is None:
            raise ValueError("end_id is needed: the id that closes a reply")
        roles = tuple(message["role"] for message in messages)
        for number, message in enumerate(messages):
            if number < first or message["role"] != "assistant":
                continue
            if number == start:
                raise ValueError(f"message {number} is an assistant's, and answers nothing")
            around = self._around(roles[:number])
            pieces = [Piece(self._after_reply(around[start], start), False)]
            for earlier, behind in zip(messages[start:number], around[start + 1 :], strict=True):
                pieces += [*_contents(earlier), Piece(behind, False)]
            prompt = self._tokens.encode(pieces)
            reply = [*self._tokens.encode([*_contents(message, around[-1])]), end]
            row += prompt + reply
            said += [False] * len(prompt) + [True] * len(reply)
            start = number + 1
        if not row:
            raise ValueError("there is no assistant message in it")
        return row, said

    def _after_reply(self, head: str, start: int) -> str:
        """``head`` without the end token that the reply before it has already."""
        if not start or self._end is None:
            return head
        closing = str(self._tokenizer.convert_ids_to_tokens(self._end))
        ended = head.lstrip().startswith(closing)
        return head.lstrip().removeprefix(closing) if ended else head

    def _make_around(self, roles: tuple[str, ...]) -> list[str]:
        """What the template writes before, between and behind messages of ``roles``."""
        try:
            text, parts = self.render(_probes(roles)), []
        except TemplateError as error:
            raise ValueError(f"the chat template refuses {', '.join(roles)}: {error}") from error
        for probe in _probes(roles):
            before, found, text = text.partition(probe["content"])
            if not found:
                raise ValueError(f"the chat template leaves one of {', '.join(roles)} out")
            parts.append(before)
        return [*parts, text]

    def _read_marks(self) -> tuple[list[tuple[str, str | None]], dict[str, dict[str, str]]]:
        """How a conversation begins, longest first; and what ends a message, with the next role."""
        alone = self._around(("user",))
        heads: list[tuple[str, str | None]] = [(alone[0], None)]
        ends: dict[str, dict[str, str]] = {"user": {alone[1]: "assistant"}, "assistant": {}}
        for role in ("user", "tool"):
            try:
                whole = self._around(("user", "assistant", role))
            except (ValueError, TypeError, KeyError):  # a template without tools may stumble
                continue
            ends["user"] |= {whole[1]: "assistant", whole[3]: "assistant"}
            ends["assistant"] |= {whole[2].lstrip(): role}
        try:
            system = self._around(("system", "user"))
        except ValueError:
            return heads, ends
        if system[1].strip():  # else it opens the first message of the user, blanks behind it
            heads.append((system[0], system[1]))
        return sorted(heads, key=lambda head: (-len(head[0]), head[1] is None)), ends


def _probes(roles: Iterable[str]) -> list[dict[str, str]]:
    return [{"role": role, "content": chr(_PROBES + n)} for n, role in enumerate(roles)]


def _contents(message: Message, before: str = "") -> Iterable[Piece]:
    """A message's text: marks of thoughts and calls in a reply are what a model writes them as.

    The tag that opens a thought is left out where it stands ``before`` the reply.
    """
    text = message["content"]
    if message["role"] != "assistant":
        yield Piece(text, True)
        return
    text = text.strip()
    tags = [*THOUGHT.finditer(before)]
    if tags and str(tags[-1].lastgroup).startswith("open"):
        text = text.removeprefix(tags[-1].group().strip())
    place = 0
    for mark in sorted([*THOUGHT.finditer(text), *_MARKS.finditer(text)], key=re.Match.start):
        if mark.start() < place:
            continue
        yield Piece(text[place : mark.start()], True)
        yield Piece(mark.group(), False)
        place = mark.end()
    yield Piece(text[place:], True)
