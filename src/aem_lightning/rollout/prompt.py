"""The words around an environment: what the policy is told, and where its action is found.

A message knows which of its characters a template wrote and which an environment or a policy: only
the former may be control (`PromptEncoder`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any, Literal, NamedTuple

from aem_lightning.rollout import tool_call
from aem_lightning.types import EnvStep, Turn

_ACTION = re.compile(r"<action>(.*?)</action>", re.DOTALL | re.IGNORECASE)
# How thoughts open and close, each a kind of its own.
_THOUGHTS = (
    *((f"<{name}>", f"</{name}>") for name in ("think(?:ing)?", "thought", "reasoning")),
    ("<seed:think>", "</seed:think>"),
    (r"\[THINK\]", r"\[/THINK\]"),  # Magistral
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),  # Command
    (r"<\|inner_prefix\|>", r"<\|inner_suffix\|>"),  # Apertus
    (r"<\|channel>thought", r"<channel\|>"),  # Gemma 4
    (
        r"<\|channel\|>(?!final)[^<]*<\|message\|>",
        r"<\|channel\|>final[^<]*<\|message\|>",
    ),  # gpt-oss
)
THOUGHT = re.compile(
    "|".join(
        f"(?P<open_{n}>{tags[0]})|(?P<close_{n}>{tags[1]})" for n, tags in enumerate(_THOUGHTS)
    ),
    re.IGNORECASE,
)
_FUNCTION = re.compile(r"<function\s*=.*?</function\s*>", re.DOTALL)
# Lines of ReAct: some models number them, and some write them in bold or as a list.
_LINE = r"^[ \t>*_#-]*{}[ \t]*\d*[ \t*_]*:[ \t*_]*"
_THOUGHT_LINE = re.compile(_LINE.format("thought"), re.MULTILINE | re.IGNORECASE)
_ACTION_LINE = re.compile(_LINE.format("action") + r"\s*(.*)", re.MULTILINE | re.IGNORECASE)
_OBSERVATION_LINE = re.compile(_LINE.format("observation"), re.MULTILINE | re.IGNORECASE)
_FIELDS = (
    "role",
    "goal",
    "observation",
    "admissible_actions",
    "steps_taken",
    "history_length",
    "history",
)
_ITEM_FIELDS = ("step", "observation", "action", "response")
FORMATS = ("tagged", "plain", "react", "function", "tool_call", "chat")
_OURS = frozenset({"role", "steps_taken", "history_length", "step"})  # fields that a config fills


class Piece(NamedTuple):
    """A part of a message.

    ``is_content``: it was written by an environment or a policy, not by a template.
    """

    text: str
    is_content: bool


class Message(str):
    """A filled-in template: a text that remembers its pieces."""

    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, pieces: Iterable[Piece]) -> Message:
        """The message that ``pieces`` make, one after the other."""
        known = tuple(piece for piece in pieces if piece.text)
        message = cls("".join(piece.text for piece in known))
        message.pieces = known
        return message

    def strip(self, characters: str | None = None, /) -> Message:
        """Without blanks at its ends."""
        start = len(self) - len(self.lstrip(characters))
        left = len(str(self).strip(characters))
        pieces = []
        for text, is_content in self.pieces:
            kept = text[start : start + left]
            pieces.append(Piece(kept, is_content))
            start, left = max(0, start - len(text)), left - len(kept)
        return Message.of(pieces)


def fill_in(template: str, fields: Mapping[str, object]) -> Message:
    """``template.format(**fields)`` as a message; a field that is a message brings its pieces.

    Example:
        >>> fill_in("Say {action}", {"action": "hello"}).pieces
        (Piece(text='Say ', is_content=False), Piece(text='hello', is_content=True))
    """
    formatter, pieces = Formatter(), []
    for literal, name, form, conversion in formatter.parse(template):
        pieces.append(Piece(literal, False))
        if name is None:
            continue
        value, first = formatter.get_field(name, (), fields)
        if isinstance(value, Message) and not (form or conversion):
            pieces += value.pieces
        else:
            converted = formatter.convert_field(value, conversion)
            text = formatter.format_field(converted, formatter.vformat(form or "", (), fields))
            pieces.append(Piece(text, first not in _OURS))
    return Message.of(pieces)


def outside_thoughts(response: str) -> str:
    """What stands outside of thoughts.

    A tag that opens twice opens once. One that closes without having opened closes reasoning that
    began in the prompt, or went on after a mention of the tag; reasoning may also never close. In
    a thought, only its own kind of tag counts.

    Example:
        >>> outside_thoughts("<think>not <action>this</action></think>but that")
        'but that'
        >>> outside_thoughts("[THINK]a </think> [/THINK]b")
        'b'
    """
    return _without_thoughts(response)[0]


def _without_thoughts(response: str) -> tuple[str, bool]:
    """What stands outside of thoughts, and whether a thought opens and closes in it."""
    kept: list[str] = []
    thinking, thought, start = "", False, 0
    for tag in THOUGHT.finditer(response):
        side, _, kind = str(tag.lastgroup).partition("_")
        closes = side == "close"
        if thinking and kind != thinking:
            continue
        if not thinking:
            kept.append(response[start : tag.start()])
            if closes:
                kept.clear()
        thought |= bool(thinking) and closes
        thinking, start = "" if closes else kind, tag.end()
    return "".join(kept if thinking else [*kept, response[start:]]), thought


@dataclass(frozen=True)
class Prompt:
    """The templates of one way to talk to the policy; plain ``str.format`` texts that live in YAML.

    Fields of ``opening``, ``turn`` and ``window``: ``role``, ``goal``, ``observation``,
    ``admissible_actions``, ``steps_taken``, ``history_length``, ``history``. Fields of
    ``history_item``: ``step``, ``observation``, ``action``, and ``response``: the whole response,
    as it was written.

    Attributes:
        opening: The user message of the first turn.
        turn: The user message of every later turn under ``memory=transcript``.
        window: The whole user message of every later turn under ``memory=window``.
        history_item: One past turn inside ``history``.
        demonstration: How an expert's ``{action}``, and its ``{thought}`` if it tells one, are
            written as a response.
        system: The system message; ``None`` sends none (a chat template may still add its own).
        action: ``tagged`` finds the action in one pair of action tags, ``react`` in one line
            ``Action: ...`` before any line ``Observation: ...`` (what a model makes up for itself
            is not read), ``plain`` takes the whole reply, ``function`` the first
            ``<function=...>...</function>`` behind the reasoning, blanks and line breaks as they
            are, ``tool_call`` one native call of a tool: the environment's words for it, or the
            call as JSON (`tool_call.read`), ``chat`` all that is said, for an agent that reads
            replies itself (`tool_call.message`).
        tools: With ``tool_call``: the tools as JSON schemas, as chat templates take them; the
            default is the environment's own (`AgentDataModule.tools`), else ``act(action)``.
        require_thinking: With ``tagged``, a reply without think tags is malformed too; with
            ``react``, one without a line ``Thought: ...``.
        role: Who the policy is in this environment: the sentence that a format written for every
            environment lacks.

    Raises:
        ValueError: A template uses a field that does not exist, ``action`` is unknown, or
            ``tools`` are none.
    """

    opening: str
    turn: str
    window: str
    history_item: str = "[Observation {step}: '{observation}', Action {step}: '{action}']"
    demonstration: str = "{action}"
    system: str | None = None
    action: Literal["tagged", "react", "plain", "function", "tool_call", "chat"] = "tagged"
    require_thinking: bool = False
    role: str = ""
    tools: Sequence[Mapping[str, Any]] = (tool_call.ACT,)

    def __post_init__(self) -> None:
        if self.action not in FORMATS:
            raise ValueError(
                f"prompt.action={self.action!r} is unknown; allowed: "
                f"{', '.join(map(repr, FORMATS))}."
            )
        if self.action == "tool_call":
            tool_call.check_tools(self.tools)
        templates = {
            "opening": _FIELDS,
            "turn": _FIELDS,
            "window": _FIELDS,
            "history_item": _ITEM_FIELDS,
            "demonstration": ("action", "thought"),
        }
        for name, allowed in templates.items():
            try:
                getattr(self, name).format(**dict.fromkeys(allowed, ""))
            except (KeyError, IndexError, ValueError) as error:
                raise ValueError(
                    f"prompt.{name} cannot be filled in: {error!r}. "
                    f"Allowed fields: {', '.join('{' + field + '}' for field in allowed)}; "
                    "write a literal brace twice."
                ) from None

    def first_message(self, step: EnvStep) -> Message:
        """The user message that opens an episode."""
        return fill_in(self.opening, self._fields(step, (), 0))

    def next_message(self, step: EnvStep, turns: Sequence[Turn]) -> Message:
        """The user message that answers the last response, under ``memory=transcript``."""
        return fill_in(self.turn, self._fields(step, turns, 0))

    def demonstrated(self, action: str, thought: str = "", style: str = "hermes") -> Message:
        """An expert's ``action`` as a response, with the ``thought`` behind it.

        With ``action=tool_call`` the field ``{action}`` is the whole call, in the ``style`` of a
        chat template.
        """
        shown = action
        if self.action == "tool_call":
            before, text, after = tool_call.written(action, self.tools, style)
            shown = Message.of([Piece(before, False), Piece(text, True), Piece(after, False)])
        return fill_in(self.demonstration, {"action": shown, "thought": thought})

    def window_message(self, step: EnvStep, turns: Sequence[Turn], history_length: int) -> Message:
        """The user message with the last ``history_length`` turns, under ``memory=window``."""
        recent = turns[max(0, len(turns) - history_length) :]
        history: list[Piece] = []
        for number, turn in enumerate(recent, len(turns) - len(recent) + 1):
            item = {
                "step": number,
                "observation": turn.observation,
                "action": turn.action if turn.action is not None else turn.response,
                "response": turn.response,
            }
            history += [
                Piece("\n" if history else "", False),
                *fill_in(self.history_item, item).pieces,
            ]
        return fill_in(self.window, self._fields(step, turns, len(recent), Message.of(history)))

    def read(self, response: str) -> tuple[str | None, str]:
        """The action in ``response``; where it is malformed ``None``, and why: `Turn.malformed`."""
        said, thought = _without_thoughts(response)
        if self.action == "plain":
            action = " ".join(said.split())
            return (action, "") if action else (None, "no action")
        if self.action == "chat":
            return (tool_call.message(said), "") if said.strip() else (None, "no action")
        if self.action == "react":
            said = _OBSERVATION_LINE.split(said, maxsplit=1)[0]
            thought = _THOUGHT_LINE.search(said) is not None
            found = [line.strip(" \t\r*`") for line in _ACTION_LINE.findall(said)]
        elif self.action == "tool_call":
            try:
                found = [tool_call.read(said, self.tools)]
            except tool_call.MalformedCallError as error:
                return None, str(error)
        elif self.action == "function":
            found = [call.group() for call in [_FUNCTION.search(said)] if call]
        else:
            found = _ACTION.findall(said)
        if self.action in ("react", "tagged"):
            found = [" ".join(action.split()) for action in found]
        if len(found) != 1 or not found[0]:
            return None, "several actions" if len(found) > 1 else "no action"
        if self.require_thinking and not thought:
            return None, "no thought"
        return found[0], ""

    def parse(self, response: str) -> str | None:
        """The action in ``response``, or ``None`` where the response is malformed."""
        return self.read(response)[0]

    def malformed(self, response: str) -> str:
        """Why ``response`` holds no action; nothing where it does."""
        return self.read(response)[1]

    def _fields(
        self,
        step: EnvStep,
        turns: Sequence[Turn],
        history_length: int,
        history: str = "",
    ) -> dict[str, object]:
        return {
            "role": self.role,
            "goal": step.info.get("goal", ""),
            "observation": step.observation,
            "admissible_actions": "\n ".join(f"'{action}'" for action in step.admissible_actions),
            "steps_taken": len(turns),
            "history_length": history_length,
            "history": history,
        }
