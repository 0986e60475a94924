"""Whole conversations, as an agent of someone's own sends them, through a chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from aem_lightning.rollout.prompt import Piece

Apply = Callable[[Sequence[Mapping[str, Any]], Any], str]
"""From messages and tools to what the chat template writes, a reply's opening included."""

# Stands for a text while the template is filled in. Its quotation mark tells how the template
# spells texts: as they are, or as JSON does.
_PROBE = re.compile('\ue200([0-9]+)(\\\\?)"\ue201')


class _Texts(list[str]):
    """The texts that are kept from the template."""

    def probe(self, text: str) -> str:
        """What stands for ``text``; blanks at its ends are the template's to keep or strip."""
        body = text.strip()
        if not body:
            return text
        start, _, end = text.partition(body)
        self.append(body)
        return f'{start}\ue200{len(self) - 1}"\ue201{end}'

    def inside(self, value: Any) -> Any:
        """``value``, of JSON, with every text in it, keys included, replaced."""
        if isinstance(value, str):
            return self.probe(value)
        if isinstance(value, Mapping):
            return {self.probe(str(key)): self.inside(item) for key, item in value.items()}
        return [self.inside(item) for item in value] if isinstance(value, list) else value


def conversation_pieces(
    apply: Apply,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[Piece]:
    """A prompt: ``messages`` are content, whatever they spell, and the rest is the template's.

    Raises:
        ValueError: The template refuses the messages, or leaves out some of them or the tools.
    """
    texts, asked = _Texts(), []
    for message in messages:
        shown = {**message, "content": texts.probe(message["content"])}
        if calls := message.get("tool_calls"):
            shown["tool_calls"] = [
                {
                    **call,
                    "function": {
                        **call["function"],
                        "arguments": texts.inside(call["function"]["arguments"]),
                    },
                }
                for call in calls
            ]
        asked.append(shown)
    told = [dict(tool) for tool in tools] if tools else None
    roles = ", ".join(str(message["role"]) for message in messages)
    try:
        written = apply(asked, told)
        if told and written == apply(asked, None):
            raise ValueError("it has no place for tools")
        *parts, last = _PROBE.split(written)
        rows = [parts[n : n + 3] for n in range(0, len(parts), 3)]
        if missing := set(range(len(texts))) - {int(number) for _, number, _ in rows}:
            raise ValueError(f"it leaves out {texts[min(missing)][:100]!r}")
    except (TemplateError, TypeError, ValueError) as error:
        raise ValueError(
            f"The chat template cannot write what the agent has sent ({roles}): {error}. Type "
            "policy.chat_template=/path/to/template.jinja, or a model whose own one can"
        ) from error
    pieces = []
    for before, number, escape in rows:
        text = texts[int(number)]
        pieces += [Piece(before, False), Piece(_escaped(text) if escape else text, True)]
    return [*pieces, Piece(last, False)]


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
