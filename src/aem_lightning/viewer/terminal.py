"""Episodes in the terminal: a list of them, and one turn by turn."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from aem_lightning.card import RunCard, cost_rows
from aem_lightning.viewer.episodes import (
    Record,
    groups,
    mean,
    outcome_of,
    parting,
    prompts,
    verdict,
    words,
)

_STYLES = {"won": "green", "lost": "red", "broken": "yellow"}
_VERDICTS = {"accepted": "green", "not admissible": "yellow", "malformed": "red"}
_IN, _FURTHER_IN = (0, 0, 0, 2), (0, 0, 0, 4)
# Of a model's text, nothing may steer the terminal, or not be written to it (half a character).
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def card_view(card: RunCard) -> RenderableType:
    """The card of a run: what it was, and where its seconds went."""
    about = Table.grid(padding=(0, 2))
    for name, text in card.lines().items():
        about.add_row(Text(name, "dim"), _shown(text))
    if not card.costs:
        return about
    costs = Table(box=None, pad_edge=False)
    for name in ("stage", "seconds", "share", "paper"):
        costs.add_column(name, justify="left" if name == "stage" else "right")
    for row in cost_rows(card.costs):
        costs.add_row(*map(_shown, row))
    return Group(about, costs)


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


def groups_view(episodes: Mapping[int, Record]) -> RenderableType:
    """A table with a line a group: its episodes, how many were won, and where they part.

    Raises:
        ValueError: No group has two copies in it.
    """
    table = Table(box=None, pad_edge=False)
    for name in ("episodes", "stage", "task type", "won", "part at"):
        table.add_column(name, justify="right" if name == "won" else "left")
    for group in groups(episodes):
        if len(group) > 1:
            copies = [*group.values()]
            judged = [copy for copy in copies if not copy["infra_error"]]
            table.add_row(
                " ".join(map(str, group)),
                _shown(_stage(copies[0])),
                _shown(copies[0]["task_type"] or "–"),
                f"{sum(bool(copy['won']) for copy in judged)}/{len(judged)}",
                parting_in_words(copies),
            )
    if not table.row_count:
        raise ValueError(
            "--group: no two episodes are copies of one group. A run keeps whole groups where it "
            "is told so: callbacks.transcripts.every=1"
        )
    return table


def group_view(number: int, episodes: Mapping[int, Record]) -> RenderableType:
    """The actions of every copy of the episode's group, side by side, a line a turn.

    Raises:
        ValueError: The episode is the only one of its group.
    """
    found = next(group for group in groups(episodes) if number in group)
    if len(found) == 1:
        raise ValueError(
            f"--episode {number} --group: no other copy of its group is there. A run keeps whole "
            "groups where it is told so: callbacks.transcripts.every=1"
        )
    group = dict(sorted(found.items(), key=lambda each: each[1].get("copy") or 0))
    copies = [*group.values()]
    table = Table(
        box=None,
        pad_edge=False,
        title=f"{len(copies)} copies: {parting_in_words(copies)}",
        title_justify="left",
    )
    table.add_column("turn", justify="right")
    for n, copy in group.items():
        head = Text.assemble(f"{n}  ", _outcome(copy), f"  return {_number(copy['returns'])}")
        table.add_column(head, overflow="fold")
    at = parting(copies)
    for i in range(max(len(copy["turns"]) for copy in copies)):
        cells = (_cell(copy["turns"][i]) if i < len(copy["turns"]) else "" for copy in copies)
        table.add_row(f"▸ {i}" if i == at else str(i), *cells)
    return table


def parting_in_words(copies: Sequence[Record]) -> str:
    """Where copies part in what they do, and where in their words, if that is another turn."""
    done, said = parting(copies), parting(copies, words)
    told = "the same throughout" if done is None else f"part at turn {done}"
    return told if said in (done, None) else f"{told}, their words at turn {said}"


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


def _cell(turn: Record) -> Text:
    action = turn["action"]
    text = f"malformed: {turn['response']}" if action is None else action
    return Text(_plain(" ".join(text.split())), _VERDICTS[verdict(turn)])


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
