"""Demonstrations from elsewhere: recorded chats that take the place of expert play."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from aem_lightning.modules.warm_start import PROMPT, RESPONSE, Demonstrations
from aem_lightning.rollout import PromptEncoder
from aem_lightning.rollout.conversation import ChatTemplate
from aem_lightning.runner.early import KEY, KINDS, demonstration_files

log = logging.getLogger(__name__)

ROLES = ("system", "user", "assistant", "tool")
# Messages of {from, value}, as ShareGPT wrote them.
_ELSEWHERE = {"human": "user", "gpt": "assistant", "observation": "tool"}


def fingerprint(source: str | None) -> str | None:
    """A hash of what is in ``source``: other demonstrations make another warm start."""
    if source is None:
        return None
    digest = hashlib.sha256()
    for file in demonstration_files(source):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def read_demonstrations(source: str, encoder: PromptEncoder, max_context: int) -> Demonstrations:
    """The rows of recorded chats, whose assistants' messages are what is learnt.

    Args:
        source: A folder that ``datasets`` saved, or a file (or a folder of files) of JSON lines or
            parquet. Each row has ``messages``, or ``prompt`` and ``completion``, each a list of
            messages with a ``role`` and a ``content``; of the latter the completion is learnt. They
            may be texts, and ``conversations`` of ``from`` and ``value`` are read too.
        encoder: Of the policy: its chat template writes the prompts.
        max_context: Rows of more tokens are left out, and counted in the log.

    Raises:
        ValueError: No such columns, a message that is no text, or nothing that is short enough.
    """
    chat = ChatTemplate(encoder.tokenizer, encoder.end_id, encoder.chat_template_kwargs)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "kind": []}
    longest = rows = 0
    for rows, row in enumerate(_rows(source), 1):
        place = f"{KEY}={source}, row {rows}"
        messages, first = _conversation(row, place)
        try:
            ids, said = chat.ids(messages, first)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        longest = max(longest, len(ids))
        if len(ids) <= max_context:
            columns["input_ids"].append(ids)
            columns["kind"].append([RESPONSE if one else PROMPT for one in said])
    kept = len(columns["input_ids"])
    if not kept:
        raise ValueError(
            f"{KEY}={source}: none of {rows} rows has at most max_context={max_context} tokens. "
            f"Type max_context={longest}"
        )
    if kept < rows:
        log.warning(
            "%d of %d demonstrations are longer than max_context=%d tokens, and are left out; the "
            "longest has %d",
            *(rows - kept, rows, max_context, longest),
        )
    return Demonstrations(columns)


def _rows(source: str) -> Iterator[Mapping[str, Any]]:
    """The rows of ``source``; of several splits those of ``train``."""
    import datasets

    datasets.disable_progress_bars()
    files = demonstration_files(source)
    if any(file.name in ("state.json", "dataset_dict.json") for file in files):
        found = datasets.load_from_disk(source)
    else:
        kind = KINDS[files[0].suffix]
        names = [str(file) for file in files if KINDS.get(file.suffix) == kind]
        found = datasets.load_dataset(kind, data_files=names, split="train")
    if isinstance(found, datasets.DatasetDict):
        found = found["train"] if "train" in found else next(iter(found.values()))
    yield from found


def _conversation(row: Mapping[str, Any], place: str) -> tuple[list[dict[str, str]], int]:
    """The messages of a row, and the first of them that may be learnt."""
    prompt, completion = row.get("prompt"), row.get("completion")
    chat = row.get("messages") or row.get("conversations")
    if isinstance(chat, list):
        return [_message(m, place) for m in chat], 0
    if isinstance(prompt, str) and isinstance(completion, str):
        prompt = [{"role": "user", "content": prompt}]
        completion = [{"role": "assistant", "content": completion}]
    if isinstance(prompt, list) and isinstance(completion, list):
        before = [_message(m, place) for m in prompt]
        return before + [_message(m, place) for m in completion], len(before)
    raise ValueError(
        f"{place}: its columns are {', '.join(row)}. Allowed: messages, or prompt and completion, "
        "as texts or lists of {role, content}. python -m aem_lightning.export writes both"
    )


def _message(message: Mapping[str, Any], place: str) -> dict[str, str]:
    role, content = message.get("role"), message.get("content")
    if role is None and content is None:
        sender = message.get("from")
        role, content = _ELSEWHERE.get(str(sender), sender), message.get("value")
    if isinstance(content, Sequence) and not isinstance(content, str):  # parts, as vendors write it
        texts = [part.get("text") for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    if role not in ROLES or not isinstance(content, str) or message.get("tool_calls"):
        raise ValueError(
            f"{place}: {str(dict(message))[:200]} is no message of text: {{role, content}}, role "
            f"one of {', '.join(ROLES)}; write the calls of tools into the content"
        )
    return {"role": role, "content": content}
