"""Episodes below the card of their run, as one self-contained page: it loads nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from aem_lightning.card import RunCard, cost_rows
from aem_lightning.viewer.episodes import Record

PLACE = '"EPISODES"'


def page(
    episodes: Mapping[int, Record], title: str, card: RunCard | None = None, *, live: bool = False
) -> str:
    """The page of ``episodes``, by their numbers, as HTML.

    The texts of an episode reach it as data alone, which no text can leave, see `as_json`. A
    ``live`` page asks its server for what is written after them.
    """
    data = {
        "title": title,
        "live": live,
        "card": plain_card(card or RunCard("")),
        "episodes": numbered(episodes),
    }
    template = files("aem_lightning.viewer").joinpath("page.html").read_text(encoding="utf-8")
    before, after = template.split(PLACE)
    return before + as_json(data) + after


def as_json(data: Any) -> str:
    """``data`` as JSON in which no tag can end or begin: every ``<`` is written as an escape."""
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    return text.encode(errors="replace").decode()  # half a character crashes some browsers


def numbered(episodes: Mapping[int, Record]) -> list[dict[str, Any]]:
    """Episodes that know their numbers."""
    return [{"number": number, **record} for number, record in episodes.items()]


def plain_card(card: RunCard) -> dict[str, Any]:
    """A card as the page shows it, in words."""
    return {
        "name": card.name,
        "lines": [*card.lines().items()],
        "costs": cost_rows(card.costs),
    }
