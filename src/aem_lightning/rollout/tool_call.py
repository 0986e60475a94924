"""Native tool calls: tools for chat templates, and calls as Qwen, Hermes and Llama write them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

Tool = Mapping[str, Any]

ACT: Tool = {
    "type": "function",
    "function": {
        "name": "act",
        "description": "Take one action in the environment.",
        "parameters": {
            "type": "object",
            "properties": {
                "action": {
                    "type": "string",
                    "description": "what to do, in the environment's words",
                }
            },
            "required": ["action"],
        },
    },
}
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_TAG = re.compile(r"<(?=/?(?:tool_call|think)>)", re.IGNORECASE)
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


class MalformedCallError(ValueError):
    """A reply that is no call of a tool; its text says why."""


def check_tools(tools: Sequence[Tool]) -> None:
    """Refuse what is no list of tools.

    Raises:
        ValueError: A tool has no name or no parameters, or a name occurs twice.
    """
    try:
        names = [tool["function"]["name"] for tool in tools]
        shaped = all(tool["function"]["parameters"]["properties"] for tool in tools)
    except (KeyError, TypeError):
        names, shaped = [], False
    if not names or not shaped or len(set(names)) < len(names):
        raise ValueError(
            "prompt.tools has to list tools of different names, each as {type: function, function: "
            "{name: ..., description: ..., parameters: {type: object, properties: {...}, required: "
            f"[...]}}}}}}; {list(tools)!r} is given."
        )


def text_argument(tools: Sequence[Tool]) -> str | None:
    """The one argument of the one tool, where that is a text: it alone is the action."""
    properties = tools[0]["function"]["parameters"]["properties"]
    name, schema = next(iter(properties.items()))
    is_text = len(tools) == len(properties) == 1 and schema.get("type") == "string"
    return str(name) if is_text else None


def written(action: str, tools: Sequence[Tool]) -> tuple[str, str, str]:
    """The call that means ``action``: what stands before it, the action itself, what stands behind.

    A tag inside the action is spelt so that it ends neither the call nor a thought.
    """
    argument = text_argument(tools)
    if argument is None:
        return "<tool_call>\n", _TAG.sub(r"\\u003c", action), "\n</tool_call>"
    name = json.dumps(tools[0]["function"]["name"])
    before = f'<tool_call>\n{{"name": {name}, "arguments": {{{json.dumps(argument)}: "'
    text = json.dumps(action, ensure_ascii=False)[1:-1]
    return before, _TAG.sub(r"\\u003c", text), '"}}\n</tool_call>'


def read(said: str, tools: Sequence[Tool]) -> str:
    """The action in a reply whose thoughts are left out: the text argument, else the call as JSON.

    Args:
        said: One call in tags, or, as Llama writes it, a reply that is nothing but the call.
        tools: What may be called.

    Raises:
        MalformedCallError: There is no such call.
    """
    calls = _CALL.findall(said)
    bare = said.strip().removeprefix("<|python_tag|>").strip()
    if not calls and bare.startswith("{"):
        calls = [bare]
    if len(calls) != 1:
        raise MalformedCallError("several calls" if calls else "no call")
    try:
        call = json.loads(calls[0])
        calls[0].encode()
        json.dumps(call, ensure_ascii=False).encode()  # half a character is no text
    except (ValueError, RecursionError):
        raise MalformedCallError("not JSON") from None
    if not isinstance(call, dict):
        raise MalformedCallError("not an object")
    known = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    name = call.get("name")
    if not isinstance(name, str) or name not in known:
        raise MalformedCallError(f"unknown tool {name!r}")
    arguments: Any = call.get("arguments", call.get("parameters", {}))
    _check(arguments, known[name])
    if argument := text_argument(tools):
        action = str(arguments.get(argument, "")).strip()
        if not action:
            raise MalformedCallError(f"empty argument {argument!r}")
        return action
    return json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)


def _check(arguments: Any, schema: Mapping[str, Any]) -> None:
    if not isinstance(arguments, dict):
        raise MalformedCallError("arguments are no object")
    properties = schema["properties"]
    for name in schema.get("required", ()):
        if name not in arguments:
            raise MalformedCallError(f"missing argument {name!r}")
    for name, value in arguments.items():
        if name not in properties:
            raise MalformedCallError(f"unknown argument {name!r}")
        kinds = properties[name].get("type", ())
        kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
        allowed = [_TYPES[kind] for kind in kinds if kind in _TYPES]
        # A truth value is an int for Python alone.
        if allowed and not any(
            isinstance(value, kind) and (bool in kind or not isinstance(value, bool))
            for kind in allowed
        ):
            raise MalformedCallError(f"argument {name!r} is not of type {'|'.join(kinds)}")
