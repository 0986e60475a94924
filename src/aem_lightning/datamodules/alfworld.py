"""ALFWorld: official or generated games, by the same code."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from aem_lightning.datamodules.agent import AgentDataModule
from aem_lightning.envs import TextEnv
from aem_lightning.envs.alfworld import (
    THOUGHTS,
    AlfworldEnv,
    Game,
    SearchingExpert,
    check_folder,
    games_hash,
    generate_games,
    list_games,
    vocabulary_texts,
)
from aem_lightning.envs.alfworld.games import Folder
from aem_lightning.envs.alfworld.goals import Goals
from aem_lightning.types import Count, Task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GeneratedGames:
    """What to generate where there is no data set.

    Attributes:
        sizes: Games of each split.
        difficulty: ``easy``, ``medium`` or ``hard``.
        seed: Another seed gives other games.
        task_types: Task types to generate; ``None`` for all six.
    """

    sizes: Mapping[str, Count] = field(
        default_factory=lambda: {"train": 600, "valid_seen": 120, "valid_unseen": 120}
    )
    difficulty: Literal["easy", "medium", "hard"] = "easy"
    seed: int = 0
    task_types: Sequence[str] | None = None


class AlfworldDataModule(AgentDataModule):
    """ALFWorld's text games: household tasks of six types in rooms that must be searched.

    Args:
        root: The folder that holds ``json_2.1.1/{train,valid_seen,valid_unseen}``: what
            ``alfworld-download`` fills, or where generated games go.
        generate: What to generate in ``root``; ``None`` reads what is there.
        task_types: Keep these task types only.
        goals: In whose words a game's goal is said: ``template``, the generator's, or ``human``,
            one of the annotations of the game.
        cached_engine: Use the caches that make the engine 20 to 40 times faster, transcripts
            unchanged.
        settings: Arguments of `AgentDataModule`.
    """

    def __init__(
        self,
        root: str,
        *,
        generate: GeneratedGames | Mapping[str, Any] | None = None,
        task_types: Sequence[str] | None = None,
        goals: Goals = "template",
        cached_engine: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.root = Path(root).expanduser().absolute()
        self.generate = GeneratedGames(**generate) if isinstance(generate, Mapping) else generate
        self.kept_types = task_types
        self.goals: Goals = goals
        self.cached_engine = cached_engine
        self._games: dict[str, list[Game]] = {}
        self._found: dict[str, Folder] = {}

    def prepare_data(self) -> None:
        """Generate the games where they are to be generated and are not there yet.

        Of a folder of official games the log says what it holds, and how the published one differs.
        """
        if self.generate is not None:
            generate_games(self.root, **vars(self.generate), workers=self.workers)
        else:
            self._found = check_folder(self.root, self.goals)

    def games(self, split: str) -> list[Game]:
        """The games of ``split``, sorted by id."""
        if split not in self._games:
            games = list_games(
                self.root,
                split,
                task_types=self.kept_types,
                goals=self.goals,
                found=self._found.get(split),
            )
            digest = games_hash(games)
            log.info("%s: %d games, hash %s, in %s", split, len(games), digest, self.root)
            self._games[split] = games
        return self._games[split]

    def tasks(self, split: str) -> list[Task]:
        """One task a game."""
        return [Task(game.id, game.task_type, split) for game in self.games(split)]

    def game_hashes(self) -> dict[str, str]:
        """A hash of each split's games: results are comparable where these are equal."""
        splits = (self.train_split, *self.evaluation_splits)
        return {split: games_hash(self.games(split)) for split in splits}

    def env_factory(self) -> Callable[[], TextEnv]:
        """A factory of engines that play any game below ``root``."""
        return partial(AlfworldEnv, str(self.root), cached=self.cached_engine, goals=self.goals)

    def make_expert(self, task: Task, seed: int) -> SearchingExpert:
        """An expert that searches: it opens places until it sees what it needs."""
        game = next(game for game in self.games(task.split) if game.id == task.id)
        return SearchingExpert(game.params, seed=seed)

    def vocabulary(self) -> list[str]:
        """Every word that the text engine knows, and of human goals those to train on."""
        human = self.games(self.train_split) if self.goals == "human" else []
        return [*vocabulary_texts(), *(game.goal for game in human)]

    def thoughts(self) -> list[str]:
        """Every word that the expert thinks beside the game's."""
        return list(THOUGHTS)
