"""Functions as tools: the schema that a chat template shows, by signature and docstring."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

from aem_lightning.types import Tool


def tool_of(function: Callable[..., Any]) -> Tool:
    """The tool that ``function`` is.

    Raises:
        ValueError: It has no name, no docstring or an argument without a type.
    """
    from transformers.utils.chat_template_utils import (
        get_json_schema,
        parse_google_format_docstring,
    )

    name = getattr(function, "__name__", repr(function))
    plain = inspect.unwrap(function)  # below decorators
    are_plain = isinstance(function, FunctionType) and isinstance(plain, FunctionType)
    if not are_plain or inspect.iscoroutinefunction(function):
        raise ValueError(f"datamodule.tools: {name} is no plain function; write one that calls it")
    about, arguments, _ = parse_google_format_docstring(inspect.getdoc(function) or "")
    if not about:
        raise ValueError(
            f"datamodule.tools: {name} has no docstring, and that is what the policy is told of it"
        )
    parameters = inspect.signature(function).parameters
    for each in parameters.values():
        if each.kind not in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY):
            raise ValueError(f"datamodule.tools: {name}({each}) cannot be called by names alone")
        if each.annotation is each.empty:
            raise ValueError(
                f"datamodule.tools: {name}({each.name}) has no type: write {each.name}: str, or "
                "int, float, bool, list[...], dict, Literal[...]"
            )
    # An argument without a word in the docstring is told by its name.
    told = {key: (arguments or {}).get(key) or key.replace("_", " ") for key in parameters}
    lines = [f"    {key}: {' '.join(text.split())}" for key, text in told.items()]
    copy = _told(plain, name, "\n".join([about, *(["", "Args:", *lines] if lines else [])]))
    try:
        schema: Tool = get_json_schema(copy)
    except Exception as error:  # of types that JSON has no word for
        raise ValueError(f"datamodule.tools: {name} is no tool: {error}") from error
    return schema


def _told(plain: FunctionType, name: str, doc: str) -> FunctionType:
    """A copy that says ``doc``, and nothing of what it returns."""
    copy = FunctionType(plain.__code__, plain.__globals__, name, closure=plain.__closure__)
    copy.__defaults__, copy.__kwdefaults__ = plain.__defaults__, plain.__kwdefaults__
    copy.__annotations__ = dict(plain.__annotations__)
    copy.__annotations__.pop("return", None)
    copy.__doc__ = doc
    return copy
