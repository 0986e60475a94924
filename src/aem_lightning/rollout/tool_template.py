"""What a chat template makes of tools: whether it shows them, how it writes calls and answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError

from aem_lightning.rollout import tool_call
from aem_lightning.types import Tool

Render = Callable[[Sequence[Mapping[str, Any]], list[dict[str, Any]] | None], str]
"""What the template writes of a conversation, with tools or without."""

_PROBE, _ANSWER = "\ue000", '\ue001"\n\ue001'  # an answer with what JSON spells in another way
_OTHERWISE = (
    "Type another prompt (prompt=think_action), or policy.chat_template=/path/to/template.jinja"
)


class ToolTemplate(NamedTuple):
    """How a chat template speaks of tools.

    Attributes:
        style: How it writes a call: one of `tool_call.STYLES`.
        role: Who hands over what a tool answers: ``tool``, or ``user`` where it knows no such role.
        escapes: It writes answers as JSON.
    """

    style: str = "hermes"
    role: str = "user"
    escapes: bool = False


def tool_template(render: Render, template: str, tools: Sequence[Tool]) -> ToolTemplate:
    """What the chat template, whose Jinja is ``template``, makes of ``tools``.

    Raises:
        ValueError: It leaves the tools out, or writes calls in a way that is not read.
    """
    shown = tool_call.schemas(tools)
    asked = [{"role": "user", "content": _PROBE}]
    if render(asked, shown) == render(asked, None):
        raise ValueError(
            "prompt.action=tool_call is given, and this chat template has no place for tools. "
            f"{_OTHERWISE}"
        )
    role, escapes = _answers(render, template, shown)
    return ToolTemplate(_style(render, shown), role, escapes)


def _style(render: Render, tools: list[dict[str, Any]]) -> str:
    """How a call is written; Hermes' way, which is the most common, where none is written."""
    name = tools[0]["function"]["name"]
    function = {"name": name, "arguments": {"action": _PROBE}}
    call = {"type": "function", "id": "abcdefghi", "function": function}
    said = {"role": "assistant", "content": "", "tool_calls": [call]}
    try:
        text = render([{"role": "user", "content": "a"}, said], tools)
    except (TemplateError, TypeError) as error:  # arguments may have to be a text
        text = f"{_PROBE} {error}"
    if _PROBE not in text:
        return "hermes"
    if found := tool_call.style_of(text, name):
        return found
    raise ValueError(
        "prompt.action=tool_call is given, and this chat template writes calls in a way that is "
        f"not read here: {text[-200:]!r}. Read are {', '.join(tool_call.STYLES)}. {_OTHERWISE}"
    )


def _answers(render: Render, template: str, tools: list[dict[str, Any]]) -> tuple[str, bool]:
    """The role of an answer, and whether it is written as JSON."""
    if not re.search(r"""["']tool["']""", template):
        return "user", False
    turns = (("user", "a"), ("assistant", _PROBE), ("tool", _ANSWER))
    try:
        text = render([{"role": role, "content": said} for role, said in turns], tools)
    except (TemplateError, TypeError):
        return "user", False
    _, found, text = text.partition(_PROBE)
    escaped = _ANSWER.replace('"', '\\"').replace("\n", "\\n")
    if not found or (_ANSWER not in text and escaped not in text):
        return "user", False
    return "tool", _ANSWER not in text
