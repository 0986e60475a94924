"""A product: what the shop's pages show of it, what search indexes, what a purchase is worth.

Rows are those of the official ``items_shuffle.json``; the rules by which fields are read are
upstream's, so that prices, options and pages are the same.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NO_PRICE = 100.0  # upstream's price of a product that names none
NO_ATTRIBUTES = ("DUMMY_ATTR",)
_NO_DIGITS = re.compile(r"[^\d.]")


@dataclass(frozen=True, slots=True)
class Product:
    """One product of the shop.

    Attributes:
        asin: Its id: at most ten characters.
        title: Its name.
        description: A text.
        bullets: Its features.
        query: The search that it was found by when the data was collected.
        category: A coarse class, e.g. ``fashion``.
        product_category: Names of nested classes, between ``›``.
        price: What it costs, in dollars; of a range, a number drawn once.
        price_tag: What the pages say it costs.
        options: Values by the name of what can be chosen, in the order of the data.
        attributes: Short phrases that purchases are judged by.
        nouns: The nouns of the title, in lower case and in their order.
    """

    asin: str
    title: str
    description: str
    bullets: Sequence[str]
    query: str
    category: str
    product_category: str
    price: float
    price_tag: str
    options: Mapping[str, Sequence[str]]
    attributes: Sequence[str]
    nouns: Sequence[str]


def is_kept(asin: str) -> bool:
    """Whether upstream's shop has a product with this id."""
    return asin != "nan" and len(asin) <= 10


def read_product(
    row: Mapping[str, Any], attributes: Sequence[str] | None, nouns: Sequence[str], seed: int
) -> Product:
    """The product of a row of ``items_shuffle.json``; ``seed`` keys a price within a range.

    Its attributes are those of ``items_ins_v2.json``, None where it has no entry there.
    """
    asin = str(row["asin"])
    bullets = row.get("small_description")
    price, tag = read_price(row.get("pricing"), f"{seed}/price/{asin}")
    return Product(
        asin=asin,
        title=str(row.get("name") or ""),
        description=str(row.get("full_description") or ""),
        bullets=[str(b or "") for b in (bullets if isinstance(bullets, list) else [bullets])],
        query=str(row.get("query") or "").lower().strip(),
        category=str(row.get("category") or ""),
        product_category=str(row.get("product_category") or ""),
        price=price,
        price_tag=tag,
        options={
            name.lower(): [str(v["value"]).strip().replace("/", " | ").lower() for v in values]
            for name, values in (row.get("customization_options") or {}).items()
            if values is not None
        },
        attributes=list(NO_ATTRIBUTES if attributes is None else attributes),
        nouns=list(nouns),
    )


def read_price(pricing: str | None, key: str) -> tuple[float, str]:
    """The price of an official price string, and its tag; ``key`` seeds the price within a range.

    E.g. ``$12.99``, or ``$8.50$24.00`` (a range); None or empty: no price.
    """
    texts = (_NO_DIGITS.sub("", part) for part in (pricing or "").split("$")[1:])
    found = [float(text) for text in texts if re.fullmatch(r"\d+\.?\d*|\.\d+", text)]
    if not found:
        return NO_PRICE, f"${NO_PRICE}"
    if len(found) == 1:
        return found[0], f"${found[0]}"
    return random.Random(key).uniform(found[0], found[1]), f"${found[0]} to ${found[1]}"


def indexed_text(product: Product) -> str:
    """What search reads of a product."""
    options = ", and ".join(
        f"{name}: {', '.join(values)}" for name, values in product.options.items()
    )
    first = product.bullets[0] if product.bullets else ""
    return f"{product.title} {product.description} {first} {options}".lower()
