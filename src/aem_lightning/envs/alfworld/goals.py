"""A game's goal in words: the generator's, or those of people who saw what is to be done."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Any, Literal

GOAL = re.compile(r"Your task is to: (.*?)\.?\s*$", re.MULTILINE)
Goals = Literal["template", "human"]
GOALS = ("template", "human")


def human_goal(about: Mapping[str, Any], game_id: str) -> str:
    """One of the sentences in which people said a game's goal, always the same one.

    Args:
        about: The contents of ``traj_data.json``.
        game_id: Decides which sentence it is.

    Raises:
        ValueError: There is none.
    """
    annotations = about.get("turk_annotations", {}).get("anns", ())
    said = [str(one["task_desc"]) for one in annotations if str(one.get("task_desc", "")).strip()]
    if not said:
        raise ValueError(
            f"goals='human': {game_id} has no annotation in its traj_data.json; type "
            "datamodule.goals=template"
        )
    return random.Random(f"goal/{game_id}").choice(said)
