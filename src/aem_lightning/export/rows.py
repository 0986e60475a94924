"""Rows of TRL's data sets, made of recorded episodes."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from aem_lightning.export.chats import Chats, Exchange, Message, Record

Row = dict[str, Any]
FORMS: dict[str, str] = {
    "sft": "a chat a row (messages): what one prompt grew to, or under memory=window a turn",
    "completion": "a turn a row (prompt, completion)",
    "preference": "two replies of a group to one prompt (prompt, chosen, rejected)",
    "verifiers": "an episode a row (prompt, completion, reward), as verifiers saves results",
}


def rows_of(form: str, records: Sequence[Record], chats: Chats) -> list[Row]:
    """The rows of ``form`` (one of `FORMS`) that ``records`` make.

    Raises:
        ValueError: There are none, and why; or the form cannot say what was trained on.
    """
    whole = [record for record in records if not record["infra_error"]]
    make: Callable[[Sequence[Record], Chats], Iterable[Row]] = {
        "sft": _sft,
        "completion": _completion,
        "preference": _preference,
        "verifiers": _verifiers,
    }[form]
    rows = [*make(whole, chats)]
    if rows:
        return rows
    responses = sum(len(record["turns"]) for record in whole)
    if responses and chats.lost == responses:
        raise ValueError(
            f"None of {responses} prompts was kept, or is one of this chat template. Type "
            "--tokenizer <the model that was played>"
        )
    if form == "preference":
        raise ValueError(
            f"No two of {len(whole)} episodes are copies that answered one prompt in two ways and "
            "came to different returns. Keep every episode of a group: "
            "callbacks.transcripts.every=1, with group_size=2 or more"
        )
    raise ValueError(f"None of {len(whole)} episodes has a response")


def _sft(records: Sequence[Record], chats: Chats) -> Iterator[Row]:
    for record in records:
        chat: list[Message] = []
        turns: list[int] = []
        for exchange in chats.exchanges(record):
            if not exchange.goes_on:
                if chat:
                    yield {"messages": chat, **_about(record, turns[-1])}
                if any(message["role"] == "assistant" for message in exchange.before):
                    raise ValueError(
                        f"The prompt of turn {exchange.turn} of {record['task']} holds earlier "
                        "replies that are not what was said (policy.thoughts=cut, or a server's "
                        "template), so a chat would train them. Type --form completion"
                    )
                turns = []
            turns.append(exchange.turn)
            chat = [*exchange.before, exchange.said]
        if chat:
            yield {"messages": chat, **_about(record, turns[-1])}


def _completion(records: Sequence[Record], chats: Chats) -> Iterator[Row]:
    for record in records:
        for exchange in chats.exchanges(record):
            about = _about(record, exchange.turn)
            yield {"prompt": exchange.before, "completion": [exchange.said], **about}


def _verifiers(records: Sequence[Record], chats: Chats) -> Iterator[Row]:
    """Its results: what came before the first reply, and all that came from then on."""
    numbers: dict[str, int] = {}
    for record in records:
        exchanges = [*chats.exchanges(record)]
        if not exchanges:
            continue
        said = exchanges[0].before, [exchanges[0].said]
        for exchange in exchanges[1:]:  # under memory=window, too, the reply behind its prompt
            known = len(said[0]) + len(said[1]) if exchange.goes_on else 0
            said[1].extend([*exchange.before[known:], exchange.said])
        yield {
            "example_id": numbers.setdefault(record["task"], len(numbers)),
            "prompt": said[0],
            "completion": said[1],
            "answer": "",
            "task": record["task_type"] or "default",
            "reward": record["returns"],
            "info": json.dumps({name: record[name] for name in ("task", "split", "won")}),
            "is_truncated": record["truncated"],
        }


def _preference(records: Sequence[Record], chats: Chats) -> Iterator[Row]:
    """Of copies that read one prompt, the best and the worst reply by the returns they led to."""
    answers: dict[tuple[Any, ...], list[tuple[Exchange, Record]]] = defaultdict(list)
    for record in records:
        group = (record.get("stage"), record.get("iteration"), record["task"], record.get("group"))
        for exchange in chats.exchanges(record):
            answers[*group, json.dumps(exchange.before)].append((exchange, record))
    for found in answers.values():
        returns: dict[str, list[float]] = defaultdict(list)
        for exchange, record in found:
            if record["returns"] is not None:
                returns[exchange.said["content"]].append(record["returns"])
        values = {reply: fmean(each) for reply, each in returns.items()}
        if len(set(values.values())) < 2:
            continue
        best, worst = max(values, key=values.__getitem__), min(values, key=values.__getitem__)
        exchange, record = found[0]
        yield {
            "prompt": exchange.before,
            "chosen": [{"role": "assistant", "content": best}],
            "rejected": [{"role": "assistant", "content": worst}],
            "chosen_return": values[best],
            "rejected_return": values[worst],
            **_about(record, exchange.turn, ("task", "task_type", "split")),
        }


def _about(
    record: Mapping[str, Any],
    turn: int,
    names: Iterable[str] = ("task", "task_type", "split", "won", "returns"),
) -> Row:
    return {**{name: record[name] for name in names}, "turn": turn}
