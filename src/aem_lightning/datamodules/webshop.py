"""WebShop: the official catalogue or a generated one, by the same code."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal

from aem_lightning.datamodules.agent import AgentDataModule
from aem_lightning.envs import TextEnv
from aem_lightning.envs.webshop import (
    Catalogue,
    CatalogueFiles,
    GeneratedCatalogue,
    ShoppingExpert,
    WebShopEnv,
    generate_catalogue,
    open_catalogue,
    prepare_catalogue,
    split_ranges,
    task_id,
    vocabulary_texts,
)
from aem_lightning.envs.webshop.nouns import FALLBACK, GIVEN
from aem_lightning.types import Count, Task, Tool, function_tool

log = logging.getLogger(__name__)


class WebShopDataModule(AgentDataModule):
    """WebShop's goals: buy what an instruction asks for, in a shop that must be searched.

    Args:
        root: The folder of the official files, or where generated ones go. The prepared catalogue
            lies below it.
        generate: What to generate in ``root``; ``None`` reads what is there.
        products: The file of the products.
        attributes: The file of attributes and synthetic instructions.
        human: The file of human instructions.
        num_products: Take the first so many products; ``None`` takes all.
        goals: ``human`` or ``synthetic``.
        nouns: What finds the nouns of titles: a spaCy model, or ``fallback``, which is named in the
            task types since its rewards differ. Generated data brings its own.
        splits: ``original`` (test 0-499, dev 500-1499, train 1500 on), ``verl_agent`` (val 0-499,
            train 500 on), or a start and an end by name.
        goal_seed: Key of the prices within ranges and of the price caps.
        environment: Arguments of `WebShopEnv`.
        settings: Arguments of `AgentDataModule`.
    """

    def __init__(
        self,
        root: str,
        *,
        generate: GeneratedCatalogue | Mapping[str, Any] | None = None,
        products: str = "items_shuffle.json",
        attributes: str = "items_ins_v2.json",
        human: str = "items_human_ins.json",
        num_products: Count | None = None,
        goals: Literal["human", "synthetic"] = "human",
        nouns: str = "en_core_web_lg",
        splits: str | Mapping[str, Sequence[int | None]] = "original",
        goal_seed: int = 0,
        environment: Annotated[Mapping[str, Any], WebShopEnv] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        made = GeneratedCatalogue(**generate) if isinstance(generate, Mapping) else generate
        self.generate = made
        self.files = CatalogueFiles(
            Path(root).expanduser().absolute(),
            products,
            attributes,
            human,
            num_products,
            goals,
            nouns,
            goal_seed,
        )
        self.splits = splits
        self.environment = dict(environment or {})

    def prepare_data(self) -> None:
        """Generate the files, where they are to be generated, and make the catalogue of them."""
        if self.generate is not None:
            generate_catalogue(self.files.root, self.generate)
        manifest = self.catalogue.manifest
        log.info(
            "%d products, %d goals, digest %s, in %s",
            manifest["products"],
            manifest["goals"],
            manifest["digest"],
            self.folder,
        )
        if self.catalogue.tagger == FALLBACK:
            log.warning(
                "datamodule.nouns=%s: rewards are not those of spaCy's nouns, so scores cannot be "
                "compared with published ones; the task types say so",
                FALLBACK,
            )

    @cached_property
    def folder(self) -> Path:
        """The prepared catalogue; made here, where `prepare_data` was not called."""
        return prepare_catalogue(self.files)

    @property
    def catalogue(self) -> Catalogue:
        """The catalogue, as the environments of this process see it."""
        return open_catalogue(str(self.folder))

    def tasks(self, split: str) -> list[Task]:
        """One task a goal; its type is the category of the product."""
        catalogue = self.catalogue
        ranges = split_ranges(self.splits, catalogue.num_goals)
        if split not in ranges:
            others = [name for name in ranges if name != self.train_split]
            raise ValueError(
                f"split={split!r}; datamodule.splits has: {', '.join(ranges)}. "
                f"Type datamodule.evaluation_splits=[{','.join(others)}]"
            )
        suffix = f"_{FALLBACK}_nouns" if catalogue.tagger == FALLBACK else ""
        return [
            Task(task_id(number), f"{catalogue.category(number)}{suffix}", split)
            for number in ranges[split]
        ]

    def game_hashes(self) -> dict[str, str]:
        """A hash of each split's goals and the shop: results are comparable where it is equal."""
        digest = self.catalogue.manifest["digest"]
        ranges = split_ranges(self.splits, self.catalogue.num_goals)
        splits = (self.train_split, *self.evaluation_splits)
        return {
            split: hashlib.sha256(f"{digest}/{ranges[split]}".encode()).hexdigest()[:12]
            for split in splits
        }

    def env_factory(self) -> Callable[[], TextEnv]:
        """A factory of shoppers; those of one process share the catalogue."""
        return partial(WebShopEnv, str(self.folder), **self.environment)

    def make_expert(self, task: Task, seed: int) -> ShoppingExpert:
        """An expert that reads; it knows what is wanted, not which product that is."""
        goal = self.catalogue.goal(int(task.id.rpartition("/")[2]))
        kind = self.catalogue.product(goal.product).query
        return ShoppingExpert(goal, kind, reads_attributes=self.files.nouns == GIVEN)

    def tools(self) -> list[Tool]:
        """Search and click."""
        return [
            function_tool(
                "search",
                "Search the shop, on its first page.",
                {"keywords": "what to look for"},
                action="search[{keywords}]",
            ),
            function_tool(
                "click",
                "Click a product, an option or a button that the page shows.",
                {"target": "its text"},
                action="click[{target}]",
            ),
        ]

    def vocabulary(self) -> list[str]:
        """Every word of the catalogue's pages and goals."""
        return vocabulary_texts(self.catalogue, self.environment.get("separator", " [SEP] "))
