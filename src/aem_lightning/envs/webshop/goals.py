"""Goals: what a shopper is asked to buy, in words, and what the reward looks for.

Human goals are sentences that people wrote for a product, with a list of wanted options. Synthetic
goals are one for every combination of a product's option values, with a mapping from option names.
Both get a price cap. Their order, and so their numbers, are upstream's; the draws of the caps are
ours, since upstream draws them from an unseeded generator.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from aem_lightning.envs.webshop.products import Product

GoalKind = Literal["human", "synthetic"]
KINDS = ("human", "synthetic")
CAPS = tuple(10.0 * i for i in range(1, 100))
NO_CAP = 1_000_000.0
CAP_WORDS = ", and price lower than"
ORDER_SEED = 233  # upstream's

# Slices of the shuffled goals, by split; None is the end.
SPLITS: Mapping[str, Mapping[str, tuple[int, int | None]]] = {
    "original": {"test": (0, 500), "dev": (500, 1500), "train": (1500, None)},
    "verl_agent": {"val": (0, 500), "train": (500, None)},
}


@dataclass(frozen=True, slots=True)
class Goal:
    """One task of the shop.

    Attributes:
        product: Number of the product that it was written for.
        instruction: What the shopper is told.
        attributes: Wanted attributes.
        options: Wanted option values: a list (human goals), or by option name (synthetic ones).
        price_cap: The most that it may cost; `NO_CAP` without one.
    """

    product: int
    instruction: str
    attributes: Sequence[str]
    options: Sequence[str] | Mapping[str, str]
    price_cap: float

    @property
    def wish(self) -> str:
        """The instruction without its price cap."""
        return self.instruction.rpartition(CAP_WORDS)[0] or self.instruction

    @property
    def option_values(self) -> list[str]:
        """The wanted values, whatever kind of goal it is."""
        values = self.options.values() if isinstance(self.options, Mapping) else self.options
        return list(values)


def human_goals(
    number: int, product: Product, instructions: Sequence[Mapping[str, Any]], seed: int
) -> Iterator[Goal]:
    """The goals of a product's entry in ``items_human_ins.json``; those without attributes go."""
    for index, row in enumerate(instructions):
        if row["instruction_attributes"]:
            cap, text = draw_cap(product.price, f"{seed}/human/{product.asin}/{index}")
            yield Goal(
                number,
                str(row["instruction"]).strip(".") + text,
                list(row["instruction_attributes"]),
                list(row["instruction_options"]),
                cap,
            )


def synthetic_goals(
    number: int, product: Product, row: Mapping[str, Any], seed: int
) -> Iterator[Goal]:
    """The goals of a product's entry in ``items_ins_v2.json``; none without an instruction."""
    instruction = row.get("instruction")
    if instruction is None or not row.get("instruction_attributes"):
        return
    cap, text = draw_cap(product.price, f"{seed}/synthetic/{product.asin}")
    names = sorted(product.options)
    for values in itertools.product(*(product.options[name] for name in names)):
        options = dict(zip(names, values, strict=True))
        wanted = ", and ".join(f"{name}: {value}" for name, value in options.items())
        yield Goal(
            number,
            f"{instruction}{' with ' + wanted if wanted else ''}{text}",
            list(row["instruction_attributes"]),
            options,
            cap,
        )


def draw_cap(price: float, key: str) -> tuple[float, str]:
    """A price cap and its words: the larger of two of the next four multiples of ten."""
    above = [cap for cap in CAPS if cap > price][:4]
    if len(above) < 2:
        return NO_CAP, ""
    cap = max(random.Random(key).sample(above, 2))
    return cap, f"{CAP_WORDS} {cap:.2f} dollars"


def goal_order(count: int) -> list[int]:
    """Upstream's shuffle: the goal, in the order of the data, that has each number."""
    order = list(range(count))
    random.Random(ORDER_SEED).shuffle(order)
    return order


def split_ranges(splits: str | Mapping[str, Sequence[int | None]], count: int) -> dict[str, range]:
    """The goal numbers, of ``count``, of each split.

    ``splits`` are ``original``, ``verl_agent``, or a start and an end (None: the last) by name.

    Raises:
        ValueError: An unknown name, splits that overlap, or one that has no goals.
    """
    if isinstance(splits, str) and splits not in SPLITS:
        raise ValueError(
            f"splits={splits!r}; allowed: {', '.join(SPLITS)}, or a start and an end by name, e.g. "
            "splits={test: [0, 100], train: [100, null]}"
        )
    given: Mapping[str, Sequence[int | None]] = (
        SPLITS[splits] if isinstance(splits, str) else splits
    )
    ranges = {
        name: range(*slice(start, end).indices(count)) for name, (start, end) in given.items()
    }
    for (name, one), (other, two) in itertools.combinations(ranges.items(), 2):
        if max(one.start, two.start) < min(one.stop, two.stop):
            raise ValueError(
                f"splits={dict(given)}: {name} and {other} share goals; let one end where the "
                "other starts"
            )
    empty = [name for name, numbers in ranges.items() if not numbers]
    if empty:
        raise ValueError(
            f"There are {count} goals, so that splits={dict(given)} leaves {', '.join(empty)} "
            "empty; add products (num_products, or generate.products), or name smaller splits"
        )
    return ranges
