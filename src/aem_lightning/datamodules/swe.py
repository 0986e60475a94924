"""SWE: instances in SWE-bench's schema, embedded, from files or from the hub, by the same code."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from aem_lightning.datamodules.agent import AgentDataModule
from aem_lightning.envs import TextEnv
from aem_lightning.envs.swe import (
    BashExpert,
    FunctionsExpert,
    Instance,
    SweEnv,
    SweSettings,
    WordsExpert,
    choose_sandbox,
    instances_hash,
    load_instances,
)
from aem_lightning.envs.swe.expert import words_fix
from aem_lightning.envs.swe.generate import FORMATS, REPOSITORIES, SPLITS, generate_instances
from aem_lightning.envs.swe.instances import SOURCES, Source
from aem_lightning.envs.swe.official import check_official
from aem_lightning.envs.swe.repositories import Repositories
from aem_lightning.envs.swe.sandbox import Limits
from aem_lightning.envs.swe.tools import tool_schemas
from aem_lightning.envs.swe.validate import VERDICTS, read_verdicts, validate
from aem_lightning.envs.swe.vocabulary import vocabulary_texts
from aem_lightning.types import Count, Task, Tool

log = logging.getLogger(__name__)

SweExpert = FunctionsExpert | BashExpert | WordsExpert


@dataclass(frozen=True)
class GeneratedInstances:
    """What to generate for ``source=embedded``.

    Attributes:
        count: Instances over all splits.
        seed: Another seed gives other bugs.
        most_edits: Easy ones alone, each in a function of which the words dialect knows no more
            than so many edits, one of them the fix.
        invented: Functions made up at random, each with one bug, in the place of the project's own
            libraries: no function of an evaluation is one of the training's.
        file_format: ``json`` or ``parquet``.
    """

    count: Count = 120
    seed: int = 0
    most_edits: Count | None = None
    invented: bool = False
    file_format: Literal["json", "parquet"] = "json"


class SweDataModule(AgentDataModule):
    """Repositories with a bug each: mend it until hidden tests pass.

    Args:
        source: ``embedded`` makes instances of the project's own small libraries in ``root``;
            ``json`` and ``parquet`` read files, ``hub`` data sets of the Hugging Face hub.
        root: The folder of embedded instances, and of what `datasets` keeps of others.
        splits: Of each split the file; of the hub the data set and its split, ``name:split``.
            Embedded instances have their own.
        adapter: ``swebench``, ``r2e``, or ``auto``: what the columns say.
        max_instances: Keep so many of each split.
        validate: Before the first use of rows that are not embedded, grade the fix of each and no
            change: rows where these do not earn 1 and 0 are left out. ``root`` keeps the verdicts.
        generate: What to generate for ``source=embedded``.
        environment: Fields of `SweSettings`; ``limits`` are those of a command.
        settings: Arguments of `AgentDataModule`.

    Raises:
        ValueError: An unknown source or setting.
    """

    def __init__(
        self,
        root: str,
        *,
        source: Source = "embedded",
        splits: Mapping[str, str] | None = None,
        adapter: Literal["auto", "swebench", "r2e"] = "auto",
        max_instances: Count | None = None,
        validate: bool = True,
        generate: GeneratedInstances | Mapping[str, Any] | None = None,
        environment: Annotated[Mapping[str, Any], SweSettings] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if source not in SOURCES:
            raise ValueError(f"datamodule.source={source!r}; allowed: {', '.join(SOURCES)}")
        self.source = source
        self.root = Path(root).expanduser().absolute()
        self.splits = dict(splits or {})
        self.adapter = adapter
        self.max_instances = max_instances
        self.validate = validate
        made = GeneratedInstances(**generate) if isinstance(generate, Mapping) else generate
        self.generate = made or GeneratedInstances()
        self.play = self._play_settings(dict(environment or {}))
        self.keep_groups = self.play.cached  # to share what a worker remembers
        self._instances: dict[str, list[Instance]] = {}

    def _play_settings(self, given: dict[str, Any]) -> SweSettings:
        limits = given.pop("limits", None) or {}
        if self.source == "embedded":
            given["repositories"] = str(self.root / REPOSITORIES)
        unknown = sorted(set(given) - set(SweSettings.__dataclass_fields__))
        if unknown:
            allowed = ", ".join(SweSettings.__dataclass_fields__)
            raise ValueError(f"datamodule.environment has {unknown}; allowed: {allowed}")
        if given.get("records"):  # workers may have other working folders
            given["records"] = str(Path(given["records"]).expanduser().absolute())
        return SweSettings(**given, limits=Limits(**limits))

    def prepare_data(self) -> None:
        """Make the embedded instances, where they are not there yet; find out which others work."""
        if self.source != "embedded":
            for split in self._all_splits() if self.validate else ():
                validate(self._rows(split), self.play, self.root / VERDICTS, workers=self.workers)
            return
        if self.generate.file_format not in FORMATS:
            raise ValueError(
                f"datamodule.generate.file_format={self.generate.file_format!r}; allowed: "
                f"{', '.join(FORMATS)}"
            )
        choose_sandbox(self.play)  # minutes of making would otherwise come before a refusal to play
        generate_instances(
            self.root,
            **vars(self.generate),
            sandbox=choose_sandbox(replace(self.play, allow_unsafe=True)),  # the code is our own
            workers=self.workers,
        )

    def instances(self, split: str) -> list[Instance]:
        """The instances of ``split``, sorted by id; in words, those whose fix can be said."""
        if split not in self._instances:
            found = self._rows(split)
            if self.validate and self.source != "embedded":
                found = self._without_failing(split, found)
            log.info("%s: %d instances, hash %s", split, len(found), instances_hash(found))
            self._instances[split] = found
        return self._instances[split]

    def _rows(self, split: str) -> list[Instance]:
        repositories = Repositories(self.play.repositories)
        found = [repositories.located(instance) for instance in self._load(split)]
        if self.play.dialect == "words":
            found = [instance for instance in found if words_fix(instance) is not None]
        found = found[: self.max_instances]
        if not found:
            raise ValueError(
                f"split={split!r} has no instance to play with dialect={self.play.dialect}: "
                "give more (datamodule.generate.count, datamodule.splits)"
            )
        check_official(found)
        return found

    def _without_failing(self, split: str, rows: list[Instance]) -> list[Instance]:
        verdicts = read_verdicts(self.root / VERDICTS, rows, self.play)
        problems = {name: verdict.problem for name, verdict in verdicts.items() if verdict.problem}
        failing = {
            i.instance_id: problems[i.instance_id] for i in rows if i.instance_id in problems
        }
        said = "; ".join(f"{name}: {problem}" for name, problem in list(failing.items())[:5])
        if len(failing) == len(rows):
            raise ValueError(
                f"split={split!r}: no row earns 1 for its fix and 0 for no change. {said}. "
                "To play them all the same, type datamodule.validate=false"
            )
        if failing:
            log.warning("%s: %d of %d rows are left out: %s", split, len(failing), len(rows), said)
        return [instance for instance in rows if instance.instance_id not in failing]

    def _load(self, split: str) -> list[Instance]:
        if self.source == "embedded":
            if split not in SPLITS:
                raise ValueError(f"split={split!r}; embedded instances have {', '.join(SPLITS)}")
            kind: Any = self.generate.file_format
            path, where = str(self.root / f"{split}.{kind}"), split
        elif split not in self.splits:
            raise ValueError(f"split={split!r}; datamodule.splits has: {', '.join(self.splits)}")
        else:
            kind, path, where = self.source, self.splits[split], split
            if kind == "hub":
                path, _, where = path.partition(":")
        cache = str(self.root / "datasets")
        where = where or split
        return load_instances(kind, path, split=where, adapter=self.adapter, cache_dir=cache)

    def tasks(self, split: str) -> list[Task]:
        """One task an instance; its type is the repository."""
        return [instance.task(split) for instance in self.instances(split)]

    def game_hashes(self) -> dict[str, str]:
        """A hash of each split's instances: results are comparable where these are equal."""
        return {split: instances_hash(self.instances(split)) for split in self._all_splits()}

    def env_factory(self) -> Callable[[], TextEnv]:
        """A factory of environments that play any instance of the splits in use."""
        known = {i.instance_id: i for split in self._all_splits() for i in self.instances(split)}
        return partial(SweEnv, tuple(known.values()), self.play)

    def make_expert(self, task: Task, seed: int) -> SweExpert:
        """An expert that plays the gold patch; in words, one that tries what could be it."""
        instance = next(i for i in self.instances(task.split) if i.instance_id == task.id)
        if self.play.dialect == "words":
            return WordsExpert(instance, seed)
        return (BashExpert if self.play.dialect == "bash" else FunctionsExpert)(instance)

    def tools(self) -> list[Tool]:
        """Editor, search and shell; the other dialects have none."""
        return tool_schemas() if self.play.dialect == "functions" else []

    def vocabulary(self) -> list[str]:
        """Every word that embedded libraries and the environment can say."""
        return vocabulary_texts()

    def _all_splits(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.train_split, *self.evaluation_splits)))
