"""The shop's pages, as the texts that an agent reads and what it can click on them.

``text`` is upstream's mode of that name, the visible strings between separators. ``text_rich``
marks buttons, one string a line, and says which options and products were clicked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from aem_lightning.envs.webshop.products import Product

Mode = Literal["text", "text_rich"]
MODES = ("text", "text_rich")
Kind = Literal["text", "button", "product", "option"]

SEARCH, BACK, PREVIOUS, NEXT, BUY = "Search", "Back to Search", "< Prev", "Next >", "Buy Now"
SUB_PAGES = ("Description", "Features", "Reviews")
ATTRIBUTES = "Attributes"
# JSON inside a page: what HTML would read as its own is escaped.
_ESCAPES = {character: f"\\u{ord(character):04x}" for character in "<>&'"}
_UNKNOWN = (
    *("attrs", "None", "category", "None", "query", "None", "product category", "None"),
    *("Target", "asin", "options", "attrs", "price upper", "instuction text", "category"),
    *("product category", "query", "Goal", "None"),
)


@dataclass(frozen=True, slots=True)
class Part:
    """A string on a page.

    Attributes:
        text: What is shown.
        kind: ``option`` and ``product`` are clicked by their text, as buttons are.
        clicked: It was clicked before.
        axis: The option's name, of options.
    """

    text: str
    kind: Kind = "text"
    clicked: bool = False
    axis: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """A page: its parts from top to bottom."""

    parts: tuple[Part, ...]

    def render(self, mode: Mode, separator: str) -> str:
        """The page as text; strings of blanks alone are not shown."""
        if mode == "text":
            return separator.join(text for part in self.parts if (text := part.text.strip()))
        clicked = [part.text for part in self.parts if part.kind == "option" and part.clicked]
        head = "".join(f"You have clicked {text}.\n" for text in reversed(clicked))
        return head + "".join(f"{_rich(p)}\n" for p in self.parts if p.text.strip())

    def clickables(self) -> dict[str, Part]:
        """What can be clicked, in lower case: buttons, products, then options.

        A name that is a button's stands for the button, as upstream has it, and a value of two
        options for the last one. Blanks count as one: responses are read so. Neither the search
        button is among them, which needs words, nor what is blank.
        """
        found: dict[str, Part] = {}
        # Sorting keeps the order within each of the two.
        for part in sorted(self.parts, key=lambda part: part.kind == "option"):
            name = single_blanks(part.text.lower())
            if part.kind == "text" or name in ("", SEARCH.lower()):
                continue
            if part.kind != "option" or found.get(name, part).kind == "option":
                found[name] = part
        return found


def single_blanks(text: str) -> str:
    """``text`` with one blank for each run of them, and none around it."""
    return " ".join(text.split())


def _rich(part: Part) -> str:
    """A part as ``text_rich`` shows it."""
    text = part.text.strip()
    if part.kind == "text":
        return text
    lead = {"button": "", "product": "\n", "option": "  "}[part.kind]
    mark = "clicked button" if part.clicked and part.kind != "button" else "button"
    return f"{lead}[{mark}] {text} [{mark}_]"


def search_page(instruction: str) -> Page:
    """Where an episode starts."""
    return Page((Part("WebShop"), *_header(instruction), Part(SEARCH, "button")))


def results_page(
    instruction: str, products: Sequence[Product], number: int, total: int, seen: set[str]
) -> Page:
    """Page ``number`` of a search that found ``total``; ``Next >`` is there past the end, too."""
    parts = [
        *_header(instruction),
        Part(BACK, "button"),
        Part(f"Page {number} (Total results: {total})"),
    ]
    if number > 1:
        parts.append(Part(PREVIOUS, "button"))
    parts.append(Part(NEXT, "button"))
    for product in products:
        parts.append(Part(product.asin, "product", product.asin in seen))
        parts += [Part(product.title), Part(product.price_tag)]
    return Page(tuple(parts))


def item_page(
    instruction: str, product: Product, chosen: Mapping[str, str], *, show_attributes: bool
) -> Page:
    """A product; what is chosen shows in ``text_rich`` alone."""
    parts = [*_header(instruction), Part(BACK, "button"), Part(PREVIOUS, "button")]
    for axis, values in product.options.items():
        parts.append(Part(axis))
        parts += [Part(v, "option", v in chosen.values(), axis) for v in values]
    parts += [
        Part(product.title),
        Part(f"Price: {product.price_tag}"),
        Part("Rating: N.A."),
        *(Part(name, "button") for name in SUB_PAGES),
    ]
    if show_attributes:
        parts.append(Part(ATTRIBUTES, "button"))
    return Page((*parts, Part(BUY, "button")))


def sub_page(instruction: str, product: Product, name: str) -> Page:
    """One of a product's sub pages, by the name of its button."""
    contents = {
        "Description": [product.description],
        "Features": product.bullets,
        "Reviews": (),  # upstream reads no reviews, and prints nothing in their place
        ATTRIBUTES: [
            *product.attributes,
            product.category,
            product.query,
            product.product_category,
        ],
    }
    head = (*_header(instruction), Part(BACK, "button"), Part(PREVIOUS, "button"))
    return Page((*head, *map(Part, contents[name])))


def done_page(asin: str, chosen: Mapping[str, str], reward: float) -> Page:
    """What follows a purchase."""
    options = json.dumps(dict(chosen), sort_keys=True)
    for character, escape in _ESCAPES.items():
        options = options.replace(character, escape)
    texts = (
        *("Thank you for shopping with us!", "Your code:", "None"),
        *("(Paste it in your MTurk interface.)", "Purchased", "asin", asin, "options", options),
        *_UNKNOWN,
        *("Reward", "Your score (min 0.0, max 1.0)", str(reward), "Reward Details", "None"),
    )
    return Page(tuple(map(Part, texts)))


def _header(instruction: str) -> tuple[Part, ...]:
    """The instruction; empty where it is not shown."""
    return (Part("Instruction:"), Part(instruction)) if instruction else ()
