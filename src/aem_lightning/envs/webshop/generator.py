"""A shop made on the spot, in the official files' schema.

Products come in clusters of near-duplicates: the same thing from the same brand, which differ in
what a goal asks for: an attribute, the values that an option has, the price. All texts of a cluster
hold the same words (what a product is not, it has among its keywords, in another order), so that
search ranks them alike: it finds the cluster, and reading tells its products apart. A goal is met
by one product of its cluster alone, and by no other cluster's.

Free of upstream's quirks: no attribute or value is like another to the reward's fuzzy match, titles
name their noun, prices are single numbers, caps lie far from the dearer duplicates.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import random
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from aem_lightning.types import Count

VERSION = 1
MANIFEST = "generated.json"
PRODUCTS, ATTRIBUTES, HUMAN = "items_shuffle.json", "items_ins_v2.json", "items_human_ins.json"

NOUNS = {
    "fashion": "jacket boots scarf gloves".split(),
    "beauty": "shampoo lotion brush mirror".split(),
    "garden": "lamp rug curtain chair".split(),
    "electronics": "headset speaker charger keyboard".split(),
    "outdoor": "tent backpack lantern hammock".split(),
    "kitchen": "kettle blender skillet teapot".split(),
}
PHRASES = (
    "quick dry, machine wash, long lasting, easy clean, heavy duty, noise free, water proof, "
    "anti slip, extra soft, hand made, fast setup, low weight, high grip, deep pocket, "
    "double layer, wide fit, full cover, smart lock, cool touch, warm lining, clear view, "
    "safe edge, strong frame, space saving"
).split(", ")
COMMON = "gift ready, plain look, basic grade, modern line, retro print, bold logo".split(", ")
VALUES = {
    "color": "black white navy green pink brown gray purple yellow orange".split(),
    "size": "small medium large tiny huge compact slim giant".split(),
    "fabric": "cotton wool linen leather bamboo velvet nylon suede".split(),
}
OPENINGS = ("i need a", "i am looking for a", "find me a", "i want a")
BRANDS = [a + b for a in "Cor Del Fen Hol Kel Lum Mar Nor Pel Ver".split() for b in ("ano", "exa")]


@dataclass(frozen=True)
class Difficulty:
    """How much a goal asks for, and how well it is hidden.

    Attributes:
        wanted: Attributes that a goal names.
        sets: Sets of attributes in a cluster; they differ in one.
        axes: Options that a goal names.
        groups: Groups of values in a cluster; a product offers those of one.
        values: Values of a group.
        hidden: Share of the clusters whose titles do not say the attributes.
        low: Prices of the cheaper products, from and to.
        dearer: What the dearer ones cost more, from and to; over 40, so that no cap covers it.
        whole: Prices are whole dollars.
    """

    wanted: int
    sets: int
    axes: int
    groups: int
    values: int
    hidden: float
    low: tuple[float, float]
    dearer: tuple[float, float]
    whole: bool = False

    @property
    def cluster(self) -> int:
        """Products of a cluster: every set, group and price."""
        return self.sets * self.groups * 2


DIFFICULTIES = {
    "easy": Difficulty(1, 2, 1, 1, 6, 0.0, (11, 29), (61, 66), whole=True),
    "medium": Difficulty(2, 2, 2, 2, 4, 0.5, (8, 150), (45, 90)),
    "hard": Difficulty(3, 3, 3, 2, 4, 1.0, (8, 150), (45, 90)),
}


@dataclass(frozen=True)
class GeneratedCatalogue:
    """What to generate.

    Attributes:
        products: How many products; what is left over by whole clusters, and what exceeds the
            clusters that there can be, are products that no goal asks for.
        difficulty: ``easy``, ``medium`` or ``hard``.
        seed: Another seed gives another shop.
        goals_per_product: Goals of a product at most.
    """

    products: Count = 1000
    difficulty: Literal["easy", "medium", "hard"] = "easy"
    seed: int = 0
    goals_per_product: Count = 12

    def __post_init__(self) -> None:
        if self.difficulty not in DIFFICULTIES:
            raise ValueError(
                f"difficulty={self.difficulty!r}; allowed: {', '.join(sorted(DIFFICULTIES))}"
            )
        least = DIFFICULTIES[self.difficulty].cluster
        if self.products < least:
            raise ValueError(
                f"products={self.products}; a {self.difficulty} cluster alone has {least}: type "
                "generate.products=1000"
            )
        if self.goals_per_product < 1:
            raise ValueError(f"goals_per_product={self.goals_per_product}; allowed: at least 1")


def generate_catalogue(root: Path, wanted: GeneratedCatalogue) -> None:
    """Write the official files of ``wanted`` to ``root``, where they are not there yet.

    Raises:
        ValueError: The folder holds another catalogue.
    """
    root.mkdir(parents=True, exist_ok=True)
    parameters = {"version": VERSION, **asdict(wanted)}
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (root / MANIFEST).exists():
            found = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
            if found != parameters:
                raise ValueError(
                    f"{root} holds another catalogue: {found}, asked for: {parameters}. Choose "
                    f"another datamodule.root, or delete {root}"
                )
            return
        others = [name for name in (PRODUCTS, ATTRIBUTES, HUMAN) if (root / name).exists()]
        if others:
            raise ValueError(
                f"{root} holds {', '.join(others)}, which this generator did not make; choose "
                "another datamodule.root, or read it: datamodule=webshop"
            )
        rows = _Shop(wanted).rows()
        for name, content in zip((PRODUCTS, ATTRIBUTES, HUMAN), rows, strict=True):
            (root / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        # Last: a folder with a manifest is whole.
        (root / MANIFEST).write_text(json.dumps(parameters, indent=1), encoding="utf-8")


@dataclass(frozen=True, slots=True)
class _Cluster:
    """What near-duplicates share.

    Attributes:
        sets: Their sets of attributes.
        groups: Their groups of values, each by option name.
        is_hidden: Titles do not say the attributes.
    """

    category: str
    noun: str
    brand: str
    sets: Sequence[Sequence[str]]
    groups: Sequence[Mapping[str, Sequence[str]]]
    is_hidden: bool

    def description(self, attributes: Sequence[str], options: Mapping[str, Sequence[str]]) -> str:
        """A text that holds all words of the cluster, however few of them fit the product."""
        # As often as those that fit are said: here, in the first bullet, and in a title.
        times = 2 if self.is_hidden else 3
        absent = sorted({a for attrs in self.sets for a in attrs} - set(attributes))
        keywords = [w for phrase in absent for w in reversed(phrase.split()) for _ in range(times)]
        keywords += [
            value
            for group in self.groups
            for axis, values in group.items()
            for value in values
            if value not in options[axis]
        ]
        text = f"A {self.noun} by {self.brand}: {' and '.join(attributes)}."
        return f"{text} Keywords: {', '.join(keywords)}." if keywords else text


class _Shop:
    """One shop; everything in it is drawn from one generator of random numbers."""

    def __init__(self, wanted: GeneratedCatalogue) -> None:
        self._wanted = wanted
        self._difficulty = DIFFICULTIES[wanted.difficulty]
        self._rng = random.Random(f"webshop/{VERSION}/{wanted.difficulty}/{wanted.seed}")
        self._products: list[dict[str, Any]] = []
        self._attributes: dict[str, Any] = {}
        self._human: dict[str, Any] = {}

    def rows(self) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
        """Products, attributes by asin, human instructions by asin."""
        for cluster in itertools.islice(
            self._clusters(), self._wanted.products // self._difficulty.cluster
        ):
            self._add_cluster(cluster)
        while len(self._products) < self._wanted.products:
            self._add_common()
        self._rng.shuffle(self._products)
        return self._products, self._attributes, self._human

    def _clusters(self) -> Iterator[_Cluster]:
        """Clusters; those of one noun have no attribute in common."""
        level, rng = self._difficulty, self._rng
        size = level.wanted + level.sets - 1
        decks = {
            noun: rng.sample(PHRASES, len(PHRASES)) for nouns in NOUNS.values() for noun in nouns
        }
        for start in range(0, len(PHRASES) - size + 1, size):
            for category, nouns in NOUNS.items():
                for noun in nouns:
                    drawn = decks[noun][start : start + size]
                    kept, last = drawn[: level.wanted - 1], drawn[level.wanted - 1 :]
                    yield _Cluster(
                        category=category,
                        noun=noun,
                        brand=rng.choice(BRANDS),
                        sets=[[*kept, phrase] for phrase in last],
                        groups=self._groups(),
                        is_hidden=rng.random() < level.hidden,
                    )

    def _groups(self) -> list[dict[str, list[str]]]:
        level = self._difficulty
        axes = list(VALUES)[: level.axes]
        drawn = {axis: self._rng.sample(VALUES[axis], level.groups * level.values) for axis in axes}
        return [
            {axis: drawn[axis][i * level.values : (i + 1) * level.values] for axis in axes}
            for i in range(level.groups)
        ]

    def _add_cluster(self, cluster: _Cluster) -> None:
        rng, level = self._rng, self._difficulty
        for attributes, options in itertools.product(cluster.sets, cluster.groups):
            low = self._price(*level.low)
            for price in (low, low + self._price(*level.dearer)):
                asin = self._add(cluster, attributes, options, price)
                if price == low:
                    wish = f"{' and '.join(attributes)} {cluster.noun}"
                    wanted = {"instruction_attributes": list(attributes)}
                    self._attributes[asin] |= {"instruction": f"Find me {wish}", **wanted}
                    combinations = list(itertools.product(*options.values()))
                    count = min(len(combinations), self._wanted.goals_per_product)
                    for values in rng.sample(combinations, count):
                        chosen = [f"{a} {v}" for a, v in zip(options, values, strict=True)]
                        told = ", ".join([f"{rng.choice(OPENINGS)} {wish}", *chosen])
                        goal = {"instruction": told, **wanted, "instruction_options": list(values)}
                        self._human.setdefault(asin, []).append(goal)

    def _add_common(self) -> None:
        """A product that no goal asks for: a cluster of one."""
        rng = self._rng
        category = rng.choice(list(NOUNS))
        noun, brand = rng.choice(NOUNS[category]), rng.choice(BRANDS)
        attributes, options = rng.sample(COMMON, 2), self._groups()[0]
        alone = _Cluster(category, noun, brand, [attributes], [options], is_hidden=False)
        self._add(alone, attributes, options, self._price(*self._difficulty.low))

    def _add(
        self,
        cluster: _Cluster,
        attributes: Sequence[str],
        options: Mapping[str, Sequence[str]],
        price: float,
    ) -> str:
        """Add an official row; returns its asin."""
        asin = ""
        while not asin or asin in self._attributes:
            asin = "B0" + "".join(self._rng.choices(string.ascii_uppercase + string.digits, k=8))
        told = [] if cluster.is_hidden else attributes
        self._products.append(
            {
                "asin": asin,
                "name": " ".join([cluster.brand, *told, cluster.noun]).title(),
                "full_description": cluster.description(attributes, options),
                "small_description": [" and ".join(attributes)],
                "pricing": f"${price:.2f}",
                "category": cluster.category,
                "query": cluster.noun,
                "product_category": f"{cluster.category} › {cluster.noun}",
                "customization_options": {
                    axis: [{"value": value, "image": None} for value in values]
                    for axis, values in options.items()
                },
                "images": [""],
                "title_nouns": [cluster.noun],
            }
        )
        self._attributes[asin] = {"attributes": list(attributes)}
        return asin

    def _price(self, low: float, high: float) -> float:
        rng = self._rng
        if self._difficulty.whole:
            return float(rng.randint(int(low), int(high)))
        return round(rng.uniform(low, high), 2)
