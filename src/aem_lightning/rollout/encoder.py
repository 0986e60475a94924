"""Messages to token ids, by the model's own chat template; a response is never tokenised again.

Content is never control. The template is rendered around a probe and the message put in its place,
so a template never sees what a message says; and what an environment or a policy wrote is plain
text even where it spells a control token (`tokens`). For harmless text the ids are those of the
template rendered with the message itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from jinja2.exceptions import TemplateError

from aem_lightning.rollout import tool_call
from aem_lightning.rollout.constraint import BLANK, Constraint, PlainActions, TaggedActions
from aem_lightning.rollout.messages import conversation_pieces
from aem_lightning.rollout.prompt import THOUGHT, Message, Piece, Prompt, outside_thoughts
from aem_lightning.rollout.tokens import TextTokens
from aem_lightning.rollout.tool_template import ToolTemplate, tool_template
from aem_lightning.types import EnvStep, Trajectory, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Memory = Literal["window", "transcript"]
ActionMode = Literal["free", "constrained"]
Thoughts = Literal["keep", "cut"]
_PROBES = 0xE000  # private use: no template and no system message has what stands there
_THOUGHT = re.compile(rf"\s*(?:{THOUGHT.pattern})\s*", re.IGNORECASE)
# Special tokens that a reply is read with: they tell thoughts and calls.
_MARKS = frozenset({"<|channel|>", "<|message|>", "<|channel>", *tool_call.MARKS})
_CALL_MARKS = re.compile(f"({'|'.join(map(re.escape, tool_call.MARKS))})")


class Encoder(Protocol):
    """What a collector asks of an encoder: prompts as ids, and responses back as text."""

    @property
    def prompt(self) -> Prompt: ...

    def first(self, step: EnvStep) -> list[int]: ...

    def next(self, step: EnvStep, trajectory: Trajectory) -> list[int]: ...

    def constraint(self, step: EnvStep) -> Constraint | None: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


class PromptEncoder:
    """Turns what an environment shows into the token ids that the policy reads.

    ``memory=transcript``: the prompt of a turn is the row so far (prompt, sampled ids, prompt, ...)
    plus the new user message, so an episode is one growing row, thoughts included, also where the
    template would drop earlier ones. With ``thoughts=cut`` the whole conversation is written anew
    without earlier thoughts, so every turn is a row of its own. ``memory=window``: the prompt is
    one fresh user message with the last ``history_length`` turns; every turn is a row, too.

    A system message goes where the template puts it; where it takes none, or moves it from turn to
    turn, it opens the first user message.

    Args:
        tokenizer: A Hugging Face tokenizer with a chat template; `Policy` notes the end tokens of
            the model's generation config in it, as ``generation_end_ids``.
        prompt: The message templates.
        memory: ``window`` or ``transcript``.
        history_length: Past turns inside a window prompt.
        action: ``free``, or ``constrained`` to the admissible actions, where an environment lists
            them.
        thoughts: Of earlier replies under ``memory=transcript``: ``keep`` or ``cut``.
        chat_template_kwargs: What the chat template is given beside the messages.

    Raises:
        ValueError: Unknown ``memory``, ``action`` or ``thoughts``, no chat template, one that
            refuses a plain conversation or the prompt's tools, or no token that could end a reply.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Prompt,
        memory: Memory = "window",
        history_length: int = 2,
        action: ActionMode = "free",
        thoughts: Thoughts = "keep",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        choices = (
            ("memory", memory, Memory),
            ("action", action, ActionMode),
            ("policy.thoughts", thoughts, Thoughts),
        )
        for name, value, kind in choices:
            if value not in get_args(kind):
                allowed = ", ".join(f"{name}={choice}" for choice in get_args(kind))
                raise ValueError(f"{name}={value!r} is unknown; allowed: {allowed}.")
        if action == "constrained" and prompt.action not in ("plain", "tagged"):
            raise ValueError(
                "action=constrained knows where an action begins in prompt.action=plain and "
                f"prompt.action=tagged; prompt.action={prompt.action} is given. Type "
                "action=free, or another prompt: prompt=think_action."
            )
        if not tokenizer.chat_template:
            raise ValueError(
                f"The tokenizer of {tokenizer.name_or_path or 'this policy'!r} has no chat "
                "template, so turns cannot be told apart. Use an instruction-tuned model "
                "(policy=qwen2_5_1_5b_lora) or give one: "
                "policy.chat_template=/path/to/template.jinja"
            )
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.memory = memory
        self.history_length = history_length
        self.action = action
        self.thoughts = thoughts
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self._tools = tool_call.schemas(prompt.tools) if prompt.action == "tool_call" else None
        template = str(tokenizer.get_chat_template(tools=self._tools))
        self._native = ToolTemplate()
        if self._tools:
            tokens = " ".join(map(str, tokenizer.added_tokens_decoder.values()))
            render = partial(self._apply, False)
            self._native = tool_template(render, f"{template} {tokens}", self._tools)
        self._merges_system = False
        self._merges_system = self._refuses_system()
        written = "".join(self._around(2, reply=False))
        self._tokens = TextTokens(tokenizer, f"{template}{written}")
        self.end_id = self._find_end()
        # Some templates open the reasoning themselves; a reply is read with that tag.
        tags = [*THOUGHT.finditer(self._around(1)[-1])]
        opens = tags and str(tags[-1].lastgroup).startswith("open")
        self._opened = tags[-1].group().strip() if opens else ""
        added = tokenizer.added_tokens_decoder.items()
        special = {number: str(token) for number, token in added if token.special}
        self._marks = {n for n, text in special.items() if text in _MARKS or THOUGHT.search(text)}
        self._dropped = set(special) - self._marks
        self._frame = lru_cache(maxsize=64)(self._make_frame)
        # Observations repeat across the copies of a group, so their ids are worth keeping.
        self._follow_up = lru_cache(maxsize=8192)(self._encode_follow_up)
        self._constraint = lru_cache(maxsize=8192)(self._make_constraint)
        if self._tools and memory == "transcript" and thoughts == "keep":
            self._make_frame("", "", "")  # where tools are told again and again

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a response: the template's end of turn, the tokenizer's, the model's."""
        named = getattr(self.tokenizer, "generation_end_ids", ())
        found = (self.end_id, self.tokenizer.eos_token_id, *named)
        return tuple(dict.fromkeys(int(number) for number in found if number is not None))

    def first(self, step: EnvStep) -> list[int]:
        """The prompt of the first turn; what an agent of someone's own sent is one as it is."""
        if "messages" in step.info:
            return self._sent(step)
        return self._tokens.encode(self._framed(self.prompt.first_message(step)))

    def next(self, step: EnvStep, trajectory: Trajectory) -> list[int]:
        """The prompt of the next turn; the last row of ``trajectory`` ends with a response."""
        turns = trajectory.turns
        if "messages" in step.info:
            return self._sent(step)
        if self.memory == "window":
            message = self.prompt.window_message(step, turns, self.history_length)
            return self._tokens.encode(self._framed(message))
        if self.thoughts == "cut":
            return self._tokens.encode(self._without_thoughts(step, turns))
        row = trajectory.rows[-1]
        ended = turns[-1].finish_reason == "stop"
        # What ended the reply; nothing where a limit cut it.
        after = str(self.tokenizer.convert_ids_to_tokens(row[-1])) if ended else ""
        return row + self._follow_up(self._answer(step, turns).pieces, after)

    def _sent(self, step: EnvStep) -> list[int]:
        messages, tools = step.info["messages"], step.info.get("tools")
        return self._tokens.encode(conversation_pieces(partial(self._apply, True), messages, tools))

    def _answer(self, step: EnvStep, turns: Sequence[Turn]) -> Message:
        """The message behind the last response, spelt as the template spells it."""
        message = self.prompt.next_message(step, turns)
        if not self._native.escapes:
            return message
        pieces = message.strip().pieces
        return Message.of(Piece(json.dumps(t, ensure_ascii=False)[1:-1], own) for t, own in pieces)

    def demonstrate(self, action: str, thought: str = "") -> list[int]:
        """The ids of an expert's response, end token included."""
        pieces = list(self.prompt.demonstrated(action, thought, self._native.style).pieces)
        if self._opened and pieces and not pieces[0].is_content:  # the tag stands in the prompt
            pieces[0] = pieces[0]._replace(text=pieces[0].text.removeprefix(self._opened))
        return [*self._tokens.encode(pieces), self.end_id]

    def constraint(self, step: EnvStep) -> Constraint | None:
        """What the response to ``step`` may be; ``None`` for anything.

        Anything, too, where an action has a blank to fill in, as ``search[<your query>]`` has.
        """
        actions = step.admissible_actions
        if self.action == "free" or not actions or any(map(BLANK.search, actions)):
            return None
        return self._constraint(step.admissible_actions)

    @property
    def pad_id(self) -> int:
        """What rows are filled up with: the tokenizer's padding, else its end token."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.tokenizer.eos_token_id)

    def decode(self, tokens: Sequence[int]) -> str:
        """A response as text, without its end token and other special tokens.

        Those that tell thoughts and calls stay, and it begins with the tag that opens the
        reasoning, where that stands in the prompt.
        """
        tokens = list(tokens)
        if tokens and tokens[-1] in self.stop_ids:  # some are no special token
            tokens.pop()
        marked = not self._marks.isdisjoint(tokens)
        if marked:
            tokens = [number for number in tokens if number not in self._dropped]
        text = self.tokenizer.decode(tokens, skip_special_tokens=not marked)
        return self._opened + str(text).strip()

    def read(self, tokens: Sequence[int]) -> str:
        """Ids as the policy reads them, special tokens included."""
        text = self.tokenizer.decode(
            list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(text)

    def _make_constraint(self, actions: tuple[str, ...]) -> Constraint:
        if self.prompt.action == "plain":
            return PlainActions(actions, tuple(tuple(self.demonstrate(a)) for a in actions))
        return TaggedActions(actions, self._encode_content, self.decode, self.stop_ids)

    def _conversation(self, messages: Sequence[str]) -> list[dict[str, str]]:
        """``messages`` of user and assistant in turn, behind the system message."""
        system = self.prompt.system
        first, *others = messages
        if system and self._merges_system:
            first = f"{system}\n\n{first}"
        opening = [{"role": "system", "content": system}] if system else []
        return [
            *([] if self._merges_system else opening),
            {"role": "user", "content": first},
            *(
                {"role": ("assistant", self._native.role)[number % 2], "content": text}
                for number, text in enumerate(others)
            ),
        ]

    def _render(self, messages: Sequence[str], reply: bool = True) -> str:
        return self._apply(reply, self._conversation(messages), self._tools)

    def _apply(self, reply: bool, conversation: Sequence[Mapping[str, Any]], tools: Any) -> str:
        text = self.tokenizer.apply_chat_template(
            [dict(message) for message in conversation],
            tokenize=False,
            add_generation_prompt=reply,
            **{"tools": tools, **self.chat_template_kwargs},
        )
        return str(text)

    def _around(
        self, count: int, start: str = "", end: str = "", *, reply: bool = True
    ) -> list[str]:
        """What the template writes before, between and behind ``count`` messages.

        The last one has the blanks ``start`` and ``end``.

        Raises:
            ValueError: The template refuses the conversation, or leaves a message out.
        """
        probes = [chr(_PROBES + number) for number in range(count)]
        try:
            text = self._render([*probes[:-1], f"{start}{probes[-1]}{end}"], reply)
        except TemplateError as error:
            raise ValueError(
                f"The chat template refuses a conversation of {count} messages, user and assistant "
                f"in turn: {error}. Type policy.chat_template=/path/to/template.jinja"
            ) from error
        parts = []
        for probe in probes:
            before, found, text = text.partition(probe)
            if not found:
                raise ValueError(
                    "The chat template does not write every message, in order. Type "
                    "memory=window, or policy.chat_template=/path/to/template.jinja"
                )
            parts.append(before)
        return [*parts, text]

    def _refuses_system(self) -> bool:
        """Whether the system message has to be a part of the first user message."""
        if not self.prompt.system:
            return False
        try:
            first, later = self._around(1), self._around(3)
        except ValueError:
            return True
        return self.prompt.system not in first[0] or first[0] != later[0]

    def _find_end(self) -> int:
        """The token that closes a reply.

        It is the first control token behind a last reply, or, where the template writes none, that
        between a reply and the next message: the next role's own, or the end of sequence.
        """
        finished = self._around(2, reply=False)[-1]
        for closing in (finished, *self._between()):
            if found := self._tokens.controls(closing):
                return found[0]
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                "The chat template writes no token behind a reply and the tokenizer has no "
                "end-of-sequence token, so a reply would never end. Type "
                "policy.chat_template=/path/to/template.jinja"
            )
        return int(self.tokenizer.eos_token_id)

    def _between(self) -> list[str]:
        """What stands between a reply and the next message; nothing where there can be no next."""
        try:
            return [self._around(3)[2]]
        except ValueError:
            return []

    def _encode_content(self, text: str) -> list[int]:
        return self._tokens.encode([Piece(text, True)])

    def _framed(self, message: Message, after: str | None = None) -> list[Piece]:
        """``message`` inside what the chat template writes around it.

        Blanks at its ends are the template's to keep or to strip.
        """
        body = message.strip()
        start, _, end = message.partition(body) if body else (message, "", "")
        head, tail = self._frame(start, end, after)
        return [Piece(head, False), *body.pieces, Piece(tail, False)]

    def _make_frame(self, start: str, end: str, after: str | None) -> tuple[str, str]:
        """What is written before and behind a message with the blanks ``start`` and ``end``.

        The message opens a conversation, or comes behind a response which the token ``after``
        ended, no token where it is empty.
        """
        if after is None:
            head, tail = self._around(1, start, end)
            return head, tail
        first, later = self._around(1), self._around(3, start, end)
        # Thoughts may be left out of earlier replies, and with them the tags that open them.
        asked, answered = (_THOUGHT.sub("", text) for text in (first[1], later[1]))
        if first[0] != later[0] or not (answered.startswith(asked) or asked.startswith(answered)):
            raise ValueError(
                "The chat template rewrites earlier turns when a new one is added, so a transcript "
                "cannot be kept as one row. Type memory=window or policy.thoughts=cut, or give a "
                "template that only appends."
            )
        head, tail = later[2:]
        if after and head.lstrip().startswith(after):  # the sampled ids already hold it
            head = head.lstrip().removeprefix(after)
        return head, tail

    def _without_thoughts(self, step: EnvStep, turns: Sequence[Turn]) -> list[Piece]:
        """The conversation up to ``step``, earlier replies without their thoughts."""
        messages: list[Message] = []
        for number, turn in enumerate(turns):
            info = {**step.info, "admissible_actions": turn.admissible_actions}
            seen = EnvStep(turn.observation, info=info)
            messages += [
                self._answer(seen, turns[:number]) if number else self.prompt.first_message(seen),
                Message.of(self._said(outside_thoughts(turn.response))),
            ]
        last = self._answer(step, turns)
        body = last.strip()
        start, _, end = last.partition(body) if body else (last, "", "")
        around = self._around(len(messages) + 1, start, end)
        pieces = [Piece(around[0], False)]
        for message, text in zip([*messages, body], around[1:], strict=True):
            pieces += [*message.strip().pieces, Piece(text, False)]
        return pieces

    def _said(self, reply: str) -> list[Piece]:
        """An earlier reply; the marks of its calls are what they were."""
        parts = _CALL_MARKS.split(reply) if self._tools else [reply]
        return [Piece(part, part not in tool_call.MARKS) for part in parts]

    def _encode_follow_up(self, pieces: tuple[Piece, ...], after: str) -> list[int]:
        """Ids between a sampled response and the next one."""
        return self._tokens.encode(self._framed(Message.of(pieces), after=after))
