"""Recorded episodes as chats: the messages that the policy read, and what it said."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aem_lightning.rollout.conversation import ChatTemplate
from aem_lightning.rollout.reply import written_calls
from aem_lightning.viewer.episodes import prompts

Message = dict[str, str]
Record = Mapping[str, Any]


@dataclass(slots=True)
class Exchange:
    """One response: the messages before it, itself, and whether it goes on from the one before."""

    turn: int
    before: list[Message]
    said: Message
    goes_on: bool


@dataclass(slots=True)
class Chats:
    """Turns recorded episodes into chats.

    Args:
        find_template: Gives the chat template that prompts were written with; asked where they were
            kept as text, and not where they were kept as messages.

    Attributes:
        lost: Responses whose prompt was not kept, or is none of the template's.
        changed: Prompts that the template would write otherwise, since it drops earlier thoughts,
            say.
    """

    find_template: Callable[[], ChatTemplate]
    lost: int = 0
    changed: int = 0
    _template: ChatTemplate | None = field(default=None, init=False)

    def exchanges(self, record: Record) -> Iterator[Exchange]:
        """The responses of an episode whose prompts were kept."""
        chat: list[Message] = []
        row: list[int] = []
        for number, (turn, kept) in enumerate(zip(record["turns"], prompts(record), strict=True)):
            before = None if kept is None else self._messages(kept, chat, row)
            if before is None:
                self.lost += 1
                continue
            said = {"role": "assistant", "content": str(turn["response"])}
            yield Exchange(number, before, said, bool(chat) and before[: len(chat)] == chat)
            chat = [*before, said]
            row = [*(kept or {}).get("ids", ()), *turn.get("ids", ())]

    def _messages(self, kept: Record, chat: list[Message], row: list[int]) -> list[Message] | None:
        """The messages of a prompt; it goes on from ``chat`` where its ids go on from ``row``."""
        if "messages" in kept:
            return [_as_text(message) for message in kept["messages"]]
        if self._template is None:
            self._template = self.find_template()
        try:
            found = self._template.read(kept["text"])
        except ValueError:
            return None
        self.changed += self._template.render(found).strip() != kept["text"].strip()
        if row and kept["ids"][: len(row)] == row and len(found) > len(chat):
            found[: len(chat)] = chat  # with the replies as they were written down
        return found


def _as_text(message: Mapping[str, Any]) -> Message:
    """A message with its calls of tools in its content, where they do not stand there already."""
    content = str(message.get("content") or "")
    calls = written_calls(message.get("tool_calls") or ())
    if calls not in content:
        content = f"{content}\n{calls}" if content else calls
    return {"role": str(message.get("role") or ""), "content": content}


def chat_reader(run: Path, tokenizer: str | None = None) -> Chats:
    """Chats of the run in the folder ``run``, whose adapter folder has the tokenizer.

    Args:
        run: A run's folder.
        tokenizer: Folder or name of another one.
    """

    def find() -> ChatTemplate:
        from transformers import AutoTokenizer

        name = tokenizer or str(run / "adapter")
        if tokenizer is None and not (run / "adapter").is_dir():
            raise FileNotFoundError(
                f"{name}: there is no adapter whose chat template the prompts were written with. "
                "Type --tokenizer <folder or name of the model that was played>"
            )
        return ChatTemplate(AutoTokenizer.from_pretrained(name), kwargs=_template_kwargs(run))

    return Chats(find)


def _template_kwargs(run: Path) -> Mapping[str, Any]:
    """What the run's chat template was given beside the messages."""
    import yaml

    config = run / ".hydra" / "config.yaml"
    if not config.is_file():
        return {}
    policy = (yaml.safe_load(config.read_text(encoding="utf-8")) or {}).get("policy")
    return (policy or {}).get("chat_template_kwargs") or {} if isinstance(policy, dict) else {}
