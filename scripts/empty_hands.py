"""How often a policy goes to where an object belongs before it has taken one: docs/results.md.

python scripts/empty_hands.py logs/graphs/quickstart, the folder of an `analysis compare`
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from aem_lightning.viewer.episodes import read_episodes


def early_visits(episode: dict[str, Any]) -> int:
    """Turns that go to the receptacle of the task while nothing has been taken yet."""
    receptacle = episode["task"].split("/")[1].split("-")[3].lower()
    visits = 0
    for turn, following in pairwise(episode["turns"]):
        action = turn["action"] or ""
        if action.startswith("take ") and not following["observation"].startswith("Nothing"):
            break
        visits += action.startswith(f"go to {receptacle} ")
    return visits


if __name__ == "__main__":
    for arm in sorted(Path(sys.argv[1], "evaluations").iterdir()):
        played = [game for run in sorted(arm.iterdir()) for game in read_episodes(run)]
        games = [game for game in played if game["task_type"].startswith("pick")]
        mean = sum(map(early_visits, games)) / len(games)
        print(f"{arm.name}: {mean:.1f} visits a game before anything is taken, {len(games)} games")
