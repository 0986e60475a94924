"""What a purchase is worth: upstream's reward, to the last bit.

``r = type * (attributes matched + options matched + [price <= cap]) / (attributes + options + 1)``

Two oddities of upstream are kept, since published scores have them: a title without common nouns is
worth nothing even where the query is the same; and where a goal names its options (synthetic
goals), name and value are compared as one tuple, so that some values that hold the name of a colour
never match. Generated catalogues hold no such values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aem_lightning.envs.base import import_extra
from aem_lightning.envs.webshop.goals import Goal
from aem_lightning.envs.webshop.products import Product

# A value is taken for the first of these that it contains, in this order.
COLOURS = (
    "alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown "
    "burgundy camel camo caramel champagne charcoal cheetah chestnut chocolate christmas coffee "
    "cognac copper coral cranberry cream crystal dark denim eggplant elephant espresso fuchsia "
    "gold granite grape graphite grass gray green grey heather indigo ivory ivy khaki lavender "
    "lemon leopard light lilac lime magenta maroon mauve merlot midnight mint mocha multicolor "
    "mushroom mustard natural navy nude olive orange peach pewter pink plum purple rainbow red "
    "rose royal rust sand sapphire seashell silver skull slate steel stone stonewash sunflower "
    "tan taupe teal tiger turquoise violet walnut wheat white wine yellow"
).split()
MATCH = 85  # a ratio above it is a match
_LATIN = dict.fromkeys(range(128, 256))  # what thefuzz takes out of texts


@dataclass(frozen=True, slots=True)
class Verdict:
    """A reward and its parts.

    Attributes:
        reward: The reward, in [0, 1].
        type: Its factor for the kind of product.
        attributes: Share of the wanted attributes that the purchase has.
        options: Share of the wanted options; 1.0 where none are wanted.
        price: The price is within the cap.
    """

    reward: float
    type: float
    attributes: float
    options: float
    price: bool


def judge(bought: Product, chosen: Mapping[str, str], goal: Goal, target: Product) -> Verdict:
    """The worth of buying ``bought`` with the values ``chosen`` of its options, by their names.

    The goal was written for the product ``target``.
    """
    kind = type_factor(bought, target)
    attributes = sum(_has_attribute(bought, wanted) for wanted in goal.attributes)
    wanted_options: Sequence[Any] = (
        list(goal.options.items()) if isinstance(goal.options, Mapping) else goal.options
    )
    options = matched_options(list(chosen.values()), wanted_options)
    price = bought.price <= goal.price_cap
    parts = len(goal.attributes) + len(wanted_options) + 1
    return Verdict(
        reward=(attributes + options + price) / parts * kind,
        type=kind,
        attributes=attributes / len(goal.attributes),
        options=options / len(wanted_options) if wanted_options else 1.0,
        price=price,
    )


def type_factor(bought: Product, target: Product) -> float:
    """How far the kind of product is right: 1.0, 0.5, 0.1 or 0.0."""
    common = set(bought.nouns) & set(target.nouns)
    title = len(common) / len(target.nouns) if target.nouns else 0.2
    if title == 0:
        return 0.0
    if title < 0.1:
        return 0.1
    is_alike = (
        bought.query == target.query or len(_classes(bought) & _classes(target)) >= 2 or title > 0.2
    )
    return 1.0 if is_alike else 0.5


def _classes(product: Product) -> set[str]:
    return {name.strip() for name in product.product_category.split("›")}


def _has_attribute(product: Product, wanted: str) -> bool:
    return (
        any(token_set_ratio(found, wanted) > MATCH for found in product.attributes)
        or wanted in product.title.lower()
        or wanted in " ".join(product.bullets).lower()
        or wanted in product.description.lower()
    )


def matched_options(chosen: Sequence[str], wanted: Sequence[str | tuple[str, str]]) -> int:
    """How many of the wanted values, or pairs of option's name and value, are among the chosen."""
    values = [normal_colour(value) for value in chosen]
    return sum(
        any(token_set_ratio(value, option) > MATCH for value in values)
        for option in map(normal_colour, wanted)
    )


def normal_colour(value: Any) -> Any:
    """The first colour in ``value``, else ``value``; in a pair: that is its name or its value."""
    return next((colour for colour in COLOURS if colour in value), value)


def token_set_ratio(one: Any, other: Any) -> int:
    """The ratio that thefuzz gives two sets of words, from 0 to 100."""
    fuzz, utils = (import_extra(f"rapidfuzz.{name}", "webshop") for name in ("fuzz", "utils"))
    first, second = (str(text).translate(_LATIN) for text in (one, other))
    ratio: float = fuzz.token_set_ratio(first, second, processor=utils.default_process)
    return round(ratio)
