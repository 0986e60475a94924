"""Native tool calls: tools for chat templates, and calls as models write them.

Read and written are ``<tool_call>`` around JSON (Qwen, Hermes) or around ``<function=...>``
(Qwen3-Coder), JSON alone (Llama), and what follows ``[TOOL_CALLS]`` (Mistral, two generations).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any

from aem_lightning.types import Tool, function_tool

ACT = function_tool(
    "act",
    "Take one action in the environment.",
    {"action": "what to do, in the environment's words"},
)
# What stands around the arguments of a call, by how it is written.
STYLES = {
    "hermes": ('<tool_call>\n{"name": "NAME", "arguments": ', "}\n</tool_call>"),
    "coder": ("<tool_call>\n<function=NAME>\n", "</function>\n</tool_call>"),
    "mistral": ('[TOOL_CALLS][{"name": "NAME", "arguments": ', "}]"),
    "tekken": ("[TOOL_CALLS]NAME[ARGS]", ""),
    "llama": ('{"name": "NAME", "parameters": ', "}"),
}
MARKS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>")
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
# A name, and what newer ones write between it and the arguments.
_NAMED = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\]\w*)?\s*(?:\[ARGS\]\s*)?(?=\{)")
_FUNCTION = re.compile(r"\s*<function\s*=\s*([\w.-]+)\s*>(.*)</function\s*>\s*", re.DOTALL)
_PARAMETER = re.compile(r"<parameter\s*=\s*([\w.-]+)\s*>\n?(.*?)\n?</parameter\s*>", re.DOTALL)
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
    """A reply that is no call of a tool; its text says why: a kind in two words, and what it is."""


def check_tools(tools: Sequence[Tool]) -> None:
    """Refuse what is no list of tools.

    Raises:
        ValueError: A tool has no name or no parameters, a name occurs twice, or an ``action`` has
            other fields than its tool has arguments.
    """
    try:
        names = [tool["function"]["name"] for tool in tools]
        shaped = all(isinstance(_arguments(tool), Mapping) for tool in tools)
        for tool in tools:
            str(tool.get("action", "")).format(**dict.fromkeys(_arguments(tool), ""))
    except (LookupError, TypeError, AttributeError, ValueError):
        names, shaped = [], False
    if not names or not shaped or len(set(names)) < len(names):
        raise ValueError(
            "prompt.tools has to list tools of different names, each as {type: function, function: "
            "{name: ..., description: ..., parameters: {type: object, properties: {...}, required: "
            "[...]}}}, beside which action: 'say {argument}' may tell the environment's own words; "
            f"{list(tools)!r} is given."
        )


def schemas(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The tools as plain values that a chat template writes as JSON."""
    return [
        _plain({key: tool[key] for key in ("type", "function") if key in tool}) for tool in tools
    ]


def written(action: str, tools: Sequence[Tool], style: str = "hermes") -> tuple[str, str, str]:
    """The call that means ``action``: what stands before its arguments, they, what stands behind.

    A tag inside an argument is spelt so that it ends neither the call nor a thought.
    """
    name, arguments = _meant(action, tools)
    before, after = STYLES[style]
    if style == "coder":
        texts = {key: _as_text(value) for key, value in arguments.items()}
        said = "".join(f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in texts.items())
    else:
        said = _TAG.sub(r"\\u003c", json.dumps(arguments, ensure_ascii=False))
    return before.replace("NAME", name), said, after


def example(tool: Tool) -> str:
    """A call of ``tool`` with the argument ``a``, for those who want its words."""
    before, after = STYLES["hermes"]
    said = json.dumps(dict.fromkeys(_arguments(tool), "a"))
    return f"{before}{said}{after}".replace("NAME", tool["function"]["name"])


def style_of(text: str, name: str) -> str | None:
    """How a chat template wrote a call of the tool ``name``; ``None`` in no way that is known."""
    squeezed = "".join(text.split())
    for style, (before, _) in STYLES.items():
        if "".join(before.replace("NAME", name).removesuffix("[ARGS]").split()) in squeezed:
            return style
    return None


def read(said: str, tools: Sequence[Tool]) -> str:
    """The action in a reply whose thoughts are left out, in the environment's words.

    These are what the tool's own ``action`` makes of the arguments; the one text argument of the
    one tool; else the call as JSON.

    Raises:
        MalformedCallError: There is no such call.
    """
    calls = _calls(said)
    if len(calls) != 1:
        raise MalformedCallError("several calls" if calls else "no call")
    (call,) = calls
    if not isinstance(call, dict):
        raise MalformedCallError("no object")
    known = {tool["function"]["name"]: tool for tool in tools}
    name = call.get("name")
    if not isinstance(name, str) or name not in known:
        raise MalformedCallError(f"unknown tool {name!r}")
    arguments: Any = call.get("arguments", call.get("parameters", {}))
    schema = known[name]["function"]["parameters"]
    if "texts" in call:
        arguments = {key: _typed(text, schema, key) for key, text in call["texts"].items()}
    _check(arguments, schema)
    template = _template(known[name], tools)
    if template is None:
        return json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    given = {key: arguments.get(key) for key in _fields(template)}
    texts = {key: "" if it is None else _as_text(it).strip() for key, it in given.items()}
    for key, text in texts.items():
        if not text:
            raise MalformedCallError(f"empty argument {key!r}")
    return template.format(**texts)


def message(said: str) -> str:
    """A reply as an agent of someone's own is to read it: as it is, or, with calls in it, as JSON.

    A call whose arguments are texts of open types says ``are_texts``.

    Example:
        >>> message("Four.")
        'Four.'
        >>> message('<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call>')[:66]
        '{"content": "", "tool_calls": [{"name": "add", "arguments": {"a": '
    """
    try:
        calls = [
            {"name": str(call["name"]), "arguments": dict(_given(call))}
            | ({"are_texts": True} if "texts" in call else {})
            for call in _calls(said)
        ]
    except (MalformedCallError, LookupError, TypeError, ValueError):
        calls = []
    content = _CALL.sub("", said).strip() if "<tool_call>" in said else ""
    told = {"content": content, "tool_calls": calls, "text": said}
    return json.dumps(told, ensure_ascii=False) if calls else said


def _given(call: Mapping[str, Any]) -> Any:
    return call.get("texts", call.get("arguments", call.get("parameters", {})))


def _calls(said: str) -> list[Any]:
    """The calls in a reply; texts of arguments whose types are open stand under ``texts``."""
    if bodies := _CALL.findall(said):
        found = [(_FUNCTION.fullmatch(body), body) for body in bodies]
        return [
            {"name": call[1], "texts": dict(_PARAMETER.findall(call[2]))} if call else _json(body)
            for call, body in found
        ]
    _, *parts = said.split("[TOOL_CALLS]")
    if len(parts) == 1:
        if named := _NAMED.match(parts[0]):
            return [{"name": named[1], "arguments": _json(parts[0][named.end() :])}]
        listed = _json(parts[0])
        return listed if isinstance(listed, list) else [listed]
    bare = said.strip().removeprefix("<|python_tag|>").strip()
    return parts or ([_json(bare)] if bare.startswith("{") else [])


def _json(text: str) -> Any:
    try:
        value = json.loads(text)
        # Half a character is no text.
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise MalformedCallError("not JSON") from None
    return value


def _meant(action: str, tools: Sequence[Tool]) -> tuple[str, dict[str, Any]]:
    """The tool and the arguments that make ``action``; an action of no tool is a call of none."""
    for tool in tools:
        template = _template(tool, tools)
        names = [] if template is None else _fields(template)
        fields = dict.fromkeys(names, "\0")
        pattern = "(.*)".join(map(re.escape, (template or "").format(**fields).split("\0")))
        if template is not None and (found := re.fullmatch(pattern, action, re.DOTALL)):
            return tool["function"]["name"], dict(zip(names, found.groups(), strict=True))
    if call := _FUNCTION.fullmatch(action):
        schema = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
        texts = dict(_PARAMETER.findall(call[2]))
        typed = {key: _typed(text, schema.get(call[1], {}), key) for key, text in texts.items()}
        return call[1], typed
    try:
        call = json.loads(action)
        return str(call["name"]), dict(call["arguments"])
    except (ValueError, LookupError, TypeError):
        return "", {"": action}


def _template(tool: Tool, tools: Sequence[Tool]) -> str | None:
    """How the environment says a call of ``tool``; ``None``: as JSON."""
    if "action" in tool:
        return str(tool["action"])
    properties = _arguments(tool)
    texts = [name for name, schema in properties.items() if schema.get("type") == "string"]
    return f"{{{texts[0]}}}" if len(tools) == len(properties) == len(texts) == 1 else None


def _fields(template: str) -> list[str]:
    return [name for _, name, *_ in Formatter().parse(template) if name]


def _arguments(tool: Tool) -> Mapping[str, Any]:
    properties: Mapping[str, Any] = tool["function"]["parameters"]["properties"]
    return properties


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _kinds(schema: Mapping[str, Any], name: str) -> tuple[str, ...]:
    found = schema.get("properties", {}).get(name, {})
    given = found.get("type", ())
    kinds = (given,) if isinstance(given, str) else tuple(given)
    return (*kinds, "null") if kinds and found.get("nullable") else kinds


def _typed(text: str, schema: Mapping[str, Any], name: str) -> Any:
    """An argument that was written as a text, as its schema wants it."""
    kinds = _kinds(schema, name)
    if not kinds or "string" in kinds:
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _check(arguments: Any, schema: Mapping[str, Any]) -> None:
    if not isinstance(arguments, dict):
        raise MalformedCallError("wrong argument: no object")
    for name in schema.get("required", ()):
        if name not in arguments:
            raise MalformedCallError(f"missing argument {name!r}")
    for name, value in arguments.items():
        if name not in schema["properties"]:
            raise MalformedCallError(f"unknown argument {name!r}")
        kinds = _kinds(schema, name)
        allowed = [_TYPES[kind] for kind in kinds if kind in _TYPES]
        # A truth value is an int for Python alone.
        if allowed and not any(
            isinstance(value, kind) and (bool in kind or not isinstance(value, bool))
            for kind in allowed
        ):
            raise MalformedCallError(f"wrong argument {name!r}: not of type {'|'.join(kinds)}")


def _plain(value: Any) -> Any:
    """A config's mappings and lists as Python's own."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
