"""Episodes in the terminal: a list of them, and one turn by turn."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from aem_lightning.viewer.episodes import Record, mean, outcome_of, prompts, verdict

_STYLES = {"won": "green", "lost": "red", "broken": "yellow"}
_VERDICTS = {"accepted": "green", "not admissible": "yellow", "malformed": "red"}
_IN, _FURTHER_IN = (0, 0, 0, 2), (0, 0, 0, 4)
# Of a model's text, nothing may steer the terminal, or not be written to it (half a character).
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def list_view(episodes: Mapping[int, Record]) -> RenderableType:
    """A table with a line an episode, and its success rates."""
    table = Table(caption=_caption(episodes), caption_justify="left", box=None, pad_edge=False)
    table.add_column("#", justify="right")
    for name in ("stage", "task type", "outcome"):
        table.add_column(name)
    for name in ("return", "turns", "invalid", "entropy"):
        table.add_column(name, justify="right")
    for number, record in episodes.items():
        turns = record["turns"]
        table.add_row(
            str(number),
            _shown(_stage(record)),
            _shown(record["task_type"] or "–"),
            _outcome(record),
            _number(record["returns"]),
            str(len(turns)),
            str(sum(verdict(turn) != "accepted" for turn in turns)),
            _number(mean(turns, "entropy")),
        )
    return table


def episode_view(number: int, record: Record, *, unfolded: bool = False) -> RenderableType:
    """One episode turn by turn, with what was recorded of each response.

    Prompts are shown where they are ``unfolded``; else a line says that they are there.
    """
    copy = f"copy {record['copy']}" if record.get("copy") else None
    about = [record["task_type"], record["split"], _stage(record), record.get("model"), copy]
    head = Text.assemble(
        (f"episode {number}  ", "bold"),
        _outcome(record),
        f"  return {_number(record['returns'])}, {len(record['turns'])} turns\n",
        (_plain(" · ".join(part for part in about if part)), "cyan"),
        (f"\n{_plain(record['task'])}", "dim"),
    )
    if why := record["infra_error"] or record.get("reason"):
        head.append(f"\n{_plain(str(why))}", "yellow")
    turns = enumerate(zip(record["turns"], prompts(record), strict=True))
    shown = (part for i, (turn, read) in turns for part in _turn(i, turn, read, unfolded))
    return Group(head, *shown)


def _turn(
    number: int, turn: Record, prompt: Record | None, unfolded: bool
) -> Iterator[RenderableType]:
    names = {"reward": "reward", "entropy": "entropy", "alpha": "α", "advantage": "A"}
    numbers = "  ".join(
        f"{shown} {_number(turn[name])}"
        for name, shown in names.items()
        if turn.get(name) is not None
    )
    cut = ", cut" if turn["finish_reason"] == "length" else ""
    yield Rule(
        Text(f"turn {number}  {numbers}  {turn['tokens']} tokens{cut}", "bold"),
        align="left",
        style="dim",
    )
    if prompt is not None:
        yield from _prompt(prompt, unfolded)
    yield Padding(Text(_plain(turn["observation"]), "dim"), _IN)
    yield Padding(Text(_plain(turn["response"])), _IN)
    found = verdict(turn)
    action = "no action in it" if turn["action"] is None else _plain(turn["action"])
    reason = f": {_plain(turn['malformed'])}" if turn.get("malformed") else ""
    yield Padding(Text(f"▸ {action}  ({found}{reason})", _VERDICTS[found]), (0, 0, 1, 2))


def _prompt(prompt: Record, unfolded: bool) -> Iterator[RenderableType]:
    messages = prompt.get("messages")
    size = f"{len(prompt['ids'])} tokens" if messages is None else f"{len(messages)} messages"
    yield Padding(Text(f"prompt: {size}{'' if unfolded else ' (--prompts shows it)'}", "dim"), _IN)
    if unfolded and messages is None:
        yield Padding(Text(_plain(prompt["text"])), _FURTHER_IN)
    for message in messages or () if unfolded else ():
        yield Padding(Text(_plain(f"{message['role']}: {message['content']}")), _FURTHER_IN)


def _caption(episodes: Mapping[int, Record]) -> Text:
    judged = [record for record in episodes.values() if not record["infra_error"]]
    parts = [f"{len(episodes)} episodes"]
    kinds = sorted({record["task_type"] for record in judged})
    for kind in ("", *kinds) if len(kinds) > 1 else ("",):
        won = [bool(record["won"]) for record in judged if kind in ("", record["task_type"])]
        if won:
            parts.append(f"{kind or 'won'} {sum(won)}/{len(won)}")
    return _shown("   ".join(parts))


def _stage(record: Record) -> str:
    iteration = record.get("iteration")
    return f"{record.get('stage') or ''} {'' if iteration is None else iteration}".strip()


def _outcome(record: Record) -> Text:
    found = outcome_of(record)
    cut = ", cut" if record["truncated"] and found == "lost" else ""
    return Text(found + cut, _STYLES[found])


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _shown(text: str) -> Text:
    return Text(_plain(text))


def _plain(text: str) -> str:
    return _CONTROL.sub("·", text)
