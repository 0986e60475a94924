"""Messages to token ids, by the model's own chat template; a response is never tokenised again.

Content is never control. The template is rendered around a probe and the message put in its place,
so a template never sees what a message says; and what an environment or a policy wrote is plain
text even where it spells a control token (`tokens`). For harmless text the ids are those of the
template rendered with the message itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, Protocol, get_args

from aem_lightning.rollout.constraint import BLANK, Constraint, PlainActions, TaggedActions
from aem_lightning.rollout.prompt import Message, Piece, Prompt
from aem_lightning.rollout.tokens import TextTokens
from aem_lightning.types import EnvStep, FinishReason, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Memory = Literal["window", "transcript"]
ActionMode = Literal["free", "constrained"]
_PROBE = "\ue000"  # private use: no template and no system message has it


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
    plus the new user message, so an episode is one growing row. ``memory=window``: the prompt is
    one fresh user message with the last ``history_length`` turns, so every turn is a row of its
    own.

    Args:
        tokenizer: A Hugging Face tokenizer with a chat template and an end-of-turn token.
        prompt: The message templates.
        memory: ``window`` or ``transcript``.
        history_length: Past turns inside a window prompt.
        action: ``free``, or ``constrained`` to the admissible actions, where an environment lists
            them.

    Raises:
        ValueError: Unknown ``memory`` or ``action``, no chat template, or a template that does not
            close a reply with the end-of-sequence token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Prompt,
        memory: Memory = "window",
        history_length: int = 2,
        action: ActionMode = "free",
    ) -> None:
        for name, value, kind in (("memory", memory, Memory), ("action", action, ActionMode)):
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
        self._closing = self._closing_text()
        turns = self._render(self._finished_conversation(), reply=False)
        self._tokens = TextTokens(tokenizer, f"{tokenizer.get_chat_template()}{turns}")
        self._frame = lru_cache(maxsize=64)(self._make_frame)
        # Observations repeat across the copies of a group, so their ids are worth keeping.
        self._follow_up = lru_cache(maxsize=8192)(self._encode_follow_up)
        self._constraint = lru_cache(maxsize=8192)(self._make_constraint)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a response: the tokenizer's end-of-sequence token."""
        return (int(self.tokenizer.eos_token_id),)

    def first(self, step: EnvStep) -> list[int]:
        """The prompt of the first turn."""
        return self._tokens.encode(self._framed(self.prompt.first_message(step)))

    def next(self, step: EnvStep, trajectory: Trajectory) -> list[int]:
        """The prompt of the next turn; the last row of ``trajectory`` ends with a response."""
        turns = trajectory.turns
        if self.memory == "window":
            message = self.prompt.window_message(step, turns, self.history_length)
            return self._tokens.encode(self._framed(message))
        follow_up = self.prompt.next_message(step, turns).pieces
        return trajectory.rows[-1] + self._follow_up(follow_up, turns[-1].finish_reason)

    def demonstrate(self, action: str, thought: str = "") -> list[int]:
        """The ids of an expert's response, end token included."""
        pieces = self.prompt.demonstrated(action, thought).pieces
        return [*self._tokens.encode(pieces), *self.stop_ids]

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
        """A response as text, without its end token and other special tokens."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()

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

    def _conversation(self, message: str) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.prompt.system}] if self.prompt.system else []
        return [*system, {"role": "user", "content": message}]

    def _render(self, conversation: list[dict[str, str]], reply: bool = True) -> str:
        text = self.tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=reply
        )
        return str(text)

    def _encode_content(self, text: str) -> list[int]:
        return self._tokens.encode([Piece(text, True)])

    def _framed(self, message: Message, after: FinishReason | None = None) -> list[Piece]:
        """``message`` inside what the chat template writes around it.

        Blanks at its ends are the template's to keep or to strip.
        """
        body = message.strip()
        start, _, end = message.partition(body) if body else (message, "", "")
        head, tail = self._frame(start, end, after)
        return [Piece(head, False), *body.pieces, Piece(tail, False)]

    def _make_frame(self, start: str, end: str, after: FinishReason | None) -> tuple[str, str]:
        """What is written before and behind a message with the blanks ``start`` and ``end``.

        The message opens a conversation, or comes ``after`` a response.
        """
        conversation = self._conversation(f"{start}{_PROBE}{end}")
        written = ""
        if after is not None:
            conversation = [*self._finished_conversation(), conversation[-1]]
            written = self._render(conversation[:-1], reply=False)
        text = self._render(conversation)
        if not text.startswith(written):
            raise ValueError(
                "The chat template rewrites earlier turns when a new one is added, so a transcript "
                "cannot be kept as one row. Type memory=window, or give a template that only "
                "appends."
            )
        head, _, tail = text[len(written) :].rpartition(_PROBE)
        closing = self._closing if after is not None else ""
        if after == "stop":  # the sampled ids already hold the end token
            closing = closing.lstrip().removeprefix(str(self.tokenizer.eos_token))
        return closing + head, tail

    def _finished_conversation(self) -> list[dict[str, str]]:
        return [*self._conversation(_PROBE), {"role": "assistant", "content": _PROBE}]

    def _closing_text(self) -> str:
        """What the template writes after a reply: the end token, for some models a line break."""
        text = self._render(self._finished_conversation(), reply=False)
        closing = text[text.rindex(_PROBE) + len(_PROBE) :]
        if not closing.lstrip().startswith(str(self.tokenizer.eos_token)):
            raise ValueError(
                f"The chat template closes a reply with {closing!r}, not with the end-of-sequence "
                f"token {self.tokenizer.eos_token!r}: the policy would never stop. Set the "
                "tokenizer's eos_token to the template's end-of-turn token, or give another "
                "template: policy.chat_template=..."
            )
        return closing

    def _encode_follow_up(
        self, pieces: tuple[Piece, ...], finish_reason: FinishReason
    ) -> list[int]:
        """Ids between a sampled response and the next one."""
        return self._tokens.encode(self._framed(Message.of(pieces), after=finish_reason))
