"""ALFWorld: the engine as a text environment, games for it, and an expert that plays them.

alfworld and textworld are optional and imported on use.
"""

from aem_lightning.envs.alfworld.engine import AlfworldEnv
from aem_lightning.envs.alfworld.expert import THOUGHTS, SearchingExpert
from aem_lightning.envs.alfworld.games import (
    SPLITS,
    Game,
    check_folder,
    games_hash,
    list_games,
)
from aem_lightning.envs.alfworld.generator import generate_games
from aem_lightning.envs.alfworld.problem import TASK_TYPES
from aem_lightning.envs.alfworld.vocabulary import vocabulary_texts

__all__ = [
    "SPLITS",
    "TASK_TYPES",
    "THOUGHTS",
    "AlfworldEnv",
    "Game",
    "SearchingExpert",
    "check_folder",
    "games_hash",
    "generate_games",
    "list_games",
    "vocabulary_texts",
]
