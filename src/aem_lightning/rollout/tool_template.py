"""What a chat template makes of tools: whether it shows them, how it writes calls and answers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError

from aem_lightning.rollout import tool_call
from aem_lightning.types import Tool

Render = Callable[[Sequence[Mapping[str, Any]], list[dict[str, Any]] | None], str]
"""What the template writes of a conversation, with tools or without."""

_PROBE, _ANSWER = "\ue000", '\ue001"\n\ue001'  # an answer with what JSON spells in another way
_TOOL_ROLE = re.compile(r"""["']tool["']""")
_CALL_TAG = re.compile(r"<[^<>\s]*tool_call[^<>\s]*>", re.IGNORECASE)
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


def tool_template(render: Render, known: str, tools: Sequence[Tool]) -> ToolTemplate:
    """What a chat template makes of ``tools``; ``known`` is its Jinja, and the model's own tokens.

    Raises:
        ValueError: It leaves the tools out, or writes calls in a way that is not read.
    """
    shown = tool_call.schemas(tools)
    asked = [{"role": "user", "content": _PROBE}]
    told = _written(render, asked, shown)
    if told is None or told == _written(render, asked, None):
        raise ValueError(
            "prompt.action=tool_call is given, and this chat template has no place for tools. "
            f"{_OTHERWISE}"
        )
    return ToolTemplate(_style(render, shown, f"{told}{known}"), *_answers(render, known, shown))


def _written(
    render: Render, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> str | None:
    """What the template writes; nothing where it refuses."""
    try:
        return render(messages, tools)
    except (TemplateError, TypeError, ValueError):
        return None


def _style(render: Render, tools: list[dict[str, Any]], known: str) -> str:
    """How a call is written; Hermes' way, which is the most common, where no other is known."""
    name = tools[0]["function"]["name"]
    function = {"name": name, "arguments": {"action": _ANSWER}}
    call = {"type": "function", "id": "abcdefghi", "function": function}
    said = {"role": "assistant", "content": "", "tool_calls": [call]}
    text = _written(render, [{"role": "user", "content": _PROBE}, said], tools)
    call_text = None if text is None else text.rpartition(_PROBE)[2]
    if call_text is not None and _ANSWER[0] not in call_text:
        others = {tag for tag in _CALL_TAG.findall(known) if tag not in tool_call.MARKS}
        if "<tool_call>" in known or not others:
            return "hermes"
        call_text = f"with {min(others)}"
    if found := tool_call.style_of(call_text or "", name):
        return found
    how = "none at all" if call_text is None else repr(call_text[:200])
    raise ValueError(
        "prompt.action=tool_call is given, and this chat template writes calls in a way that is "
        f"not read here: {how}. Read are {', '.join(tool_call.STYLES)}. {_OTHERWISE}"
    )


def _answers(render: Render, known: str, tools: list[dict[str, Any]]) -> tuple[str, bool]:
    """The role of an answer, and whether it is written as JSON."""
    turns = (("user", "a"), ("assistant", _PROBE), ("tool", _ANSWER))
    messages = [{"role": role, "content": said} for role, said in turns]
    text = _written(render, messages, tools) if _TOOL_ROLE.search(known) else None
    _, _, answer = (text or "").partition(_PROBE)
    escaped = json.dumps(_ANSWER, ensure_ascii=False)[1:-1]
    if _ANSWER not in answer and escaped not in answer:
        return "user", False
    return "tool", _ANSWER not in answer
