"""An expert that shops by reading, since it does not know which product it is after."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from aem_lightning.envs.webshop.goals import Goal
from aem_lightning.envs.webshop.pages import single_blanks

_CLICKED = re.compile(r"You have clicked .*\n|clicked (?=button)")  # what text_rich marks
_MARKS = re.compile(r"\[(?:clicked )?button_\]|\[SEP\]")  # around a title
_PRICE = re.compile(r"\$(\d+(?:\.\d+)?)")
_TAG = re.compile(r"\$\d+(?:\.\d+)?(?: to \$\d+(?:\.\d+)?)?")
BUY, NEXT, BACK, PREVIOUS = (
    "click[buy now]",
    "click[next >]",
    "click[back to search]",
    "click[< prev]",
)
FEATURES = "click[features]"
BUTTONS = ("buy now", "next >", "< prev", "back to search", "description", "features", "reviews")


class ShoppingExpert:
    """Plays from what it reads: pages, admissible actions, and what the goal wants.

    It searches for the attributes and the kind of product, opens what the list of results does not
    rule out, looks into the features where the title is silent, goes back where an attribute or an
    option's value is missing, chooses the options and buys. It takes every page as news, so others
    may act in between. It never sends an action that is not admissible.

    Args:
        goal: What is wanted.
        kind: The kind of product, in words.
        pages: Pages of results that it reads before it searches with other words.
        reads_attributes: Texts name the attributes, as generated ones do. Of official products
            they rarely do: there it goes by options and price alone.
    """

    def __init__(
        self, goal: Goal, kind: str, *, pages: int = 5, reads_attributes: bool = True
    ) -> None:
        self._attributes = [attribute.lower() for attribute in goal.attributes]
        self._options = [single_blanks(option.lower()) for option in goal.option_values]
        self._cap = goal.price_cap
        self._instruction = goal.instruction
        full = " ".join([*self._attributes, kind])
        with_options = f"{full} {' '.join(self._options)}"
        some = (full, with_options) if reads_attributes else (with_options, full)
        self._queries = (*some, kind)
        self._reads_attributes = reads_attributes
        self._pages = pages
        self._searches = 0
        self._turned = 0  # pages turned since the last search
        self._listed: dict[str, tuple[str, str]] = {}  # title and price, by asin
        self._rejected: set[str] = set()
        self._opened: str | None = None  # the product that it clicked last
        self._features: dict[str, bool] = {}  # whether they suit, by the product's page
        self._reading = ""  # the product's page whose features it went to read
        self._chosen: set[str] = set()

    def act(self, observation: str, admissible: Sequence[str]) -> str:
        """The action that answers ``observation``, of those that are accepted now."""
        allowed = frozenset(admissible)
        # The instruction names all that is wanted, and what is chosen is remembered anyway.
        observation = _CLICKED.sub("", observation.replace(self._instruction, ""))
        if BUY in allowed:
            return self._on_item(observation, allowed)
        if NEXT in allowed:
            return self._on_results(observation, admissible)
        if PREVIOUS in allowed:
            if self._reading:
                self._features[self._reading] = self._has_attributes(observation)
            self._reading = ""
            return PREVIOUS
        self._turned = 0
        self._searches += 1
        return f"search[{self._queries[(self._searches - 1) % len(self._queries)]}]"

    def _on_results(self, observation: str, admissible: Sequence[str]) -> str:
        """Open what suits best; turn the page, or search anew, where nothing does."""
        self._chosen = set()
        listings = dict(_listings(observation, admissible))
        self._listed |= listings
        cheap = {
            asin: title
            for asin, (title, price) in listings.items()
            if asin not in self._rejected and _dollars(price) <= self._cap
        }
        # Where titles say an attribute at all, those that do not are not meant.
        telling = [asin for asin, title in cheap.items() if self._has_attributes(title)]
        silent = [a for a, title in cheap.items() if not self._has_attributes(title, any)]
        if telling or silent:
            self._opened = [*telling, *silent][0]
            return f"click[{self._opened}]"
        self._turned += 1
        if listings and self._turned < self._pages:
            return NEXT
        return BACK

    def _on_item(self, observation: str, allowed: frozenset[str]) -> str:
        """Check, choose, buy."""
        page = self._identity(observation)
        suits = self._features.get(page)
        is_cheap = _dollars(observation.rpartition("Price: ")[2]) <= self._cap
        offers_all = all(f"click[{option}]" in allowed for option in self._options)
        if suits is False or not (is_cheap and offers_all):
            return self._leave(observation)
        if suits is None and not self._has_attributes(observation) and FEATURES in allowed:
            self._reading = page
            return FEATURES
        for option in self._options:
            if option not in self._chosen and f"click[{option}]" in allowed:
                self._chosen.add(option)
                return f"click[{option}]"
        return BUY

    def _leave(self, observation: str) -> str:
        """Go back; what it had opened itself is not opened again."""
        if self._opened is not None and self._is_open(self._opened, observation):
            self._rejected.add(self._opened)
        return PREVIOUS

    def _is_open(self, asin: str, observation: str) -> bool:
        title, price = self._listed[asin]
        return title in observation and price in observation

    def _identity(self, observation: str) -> str:
        """What tells a product's page from those of its duplicates."""
        is_own = self._opened is not None and self._is_open(self._opened, observation)
        return f"{self._opened if is_own else ''}{observation}"

    def _has_attributes(self, text: str, which: Callable[[Iterator[bool]], bool] = all) -> bool:
        found = which(attribute in text.lower() for attribute in self._attributes)
        return found or not self._reads_attributes


def _listings(observation: str, admissible: Sequence[str]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Products on a page of results: title and price, by asin in lower case."""
    names = [action[6:-1] for action in admissible if action.startswith("click[")]
    places = sorted(
        (place, name)
        for name in names
        if name not in BUTTONS and (place := observation.find(name.upper())) >= 0
    )
    ends = [*(place for place, _ in places[1:]), len(observation)]
    for (place, name), end in zip(places, ends, strict=False):  # without places there is no end
        text = observation[place + len(name) : end]
        tags = list(_TAG.finditer(text))  # a title may name a price too: the last one is the tag
        title = text[: tags[-1].start()] if tags else text
        yield name, (_MARKS.sub("", title).strip(" \n,;|"), tags[-1][0] if tags else "")


def _dollars(text: str) -> float:
    """The lowest price in ``text``, since of a range any may be meant; 0 where it has none."""
    return min((float(price) for price in _PRICE.findall(text)), default=0.0)
