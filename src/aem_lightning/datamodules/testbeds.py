"""Two text games on which AEM is predicted to help or to harm: a corridor, and a bait.

Which turns are decisive and which are confident is under control: the corridor's variants differ
only in the player that the warm start imitates.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations, cycle, product
from typing import Any, Literal

from aem_lightning.datamodules.agent import AgentDataModule
from aem_lightning.envs import TextEnv
from aem_lightning.types import Task

VERBS = ("push", "pull", "lift", "slide")
ROOMS = 8
# How often the player is right at a sign: the uncertain one slightly more than by chance, so that a
# policy which imitates it can read signs at all.
RIGHT = {"confident": 0.25, "uncertain": 0.4}
SPLITS = ("train", "train", "train", "valid_seen", "valid_unseen")  # of every five tasks
CODE = ("lift", "slide")  # what opens both locks of the bait's box
COLOURS = ("red", "green", "blue", "white", "black", "grey", "brown", "pink")
Variant = Literal["confident", "uncertain"]


class CorridorEnv:
    """Eight rooms in a row, of which two have a sign: there only the verb on it is right.

    In the others any verb opens the door. A wrong verb opens it too, but the episode is lost at its
    end: every episode has as many turns. The task id names the rooms with a sign and their verbs.
    """

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        self._task = options["task_id"]
        self._signs = signs_of(self._task)
        self._room, self._right = 0, True
        return self._look(), self._info(valid=True)

    def step(self, action: str, /) -> tuple[str, float, bool, bool, dict[str, Any]]:
        valid = action in VERBS
        self._right &= valid and self._signs.get(self._room, action) == action
        self._room += 1
        over = self._room == ROOMS
        won = over and self._right
        return self._look(), float(won), over, False, self._info(valid, won)

    def close(self) -> None: ...

    def _look(self) -> str:
        if self._room == ROOMS:
            return "the end ."
        sign = self._signs.get(self._room)
        return "there is no sign ." if sign is None else f"the sign says {sign} ."

    def _info(self, valid: bool, won: bool = False) -> dict[str, Any]:
        known = {"task_id": self._task, "goal": "walk to the end .", "is_action_valid": valid}
        return known | {"admissible_actions": VERBS, "won": won}


def signs_of(task_id: str) -> dict[int, str]:
    """The verb on the sign of each room that has one.

    Example:
        >>> signs_of("1-push-6-lift")
        {1: 'push', 6: 'lift'}
    """
    words = task_id.split("-")
    return {int(room): verb for room, verb in zip(words[::2], words[1::2], strict=True)}


class CorridorPlayer:
    """Whom the warm start imitates; at a sign it is right as often as ``RIGHT`` says.

    ``confident``: at signs sure of one other verb, and random where there is none. ``uncertain``:
    of any other verb, and sure where there is no sign.
    """

    def __init__(self, variant: Variant, seed: int) -> None:
        self._confident, self._random = variant == "confident", random.Random(seed)
        self._right = RIGHT[variant]

    def act(self, observation: str, admissible: Sequence[str]) -> str:
        sign = next((verb for verb in VERBS if f"says {verb} " in observation), None)
        if sign is None:
            return self._random.choice(VERBS) if self._confident else VERBS[0]
        if self._random.random() < self._right:
            return sign
        others = [verb for verb in VERBS if verb != sign]
        return VERBS[VERBS.index(sign) - 1] if self._confident else self._random.choice(others)


class BaitEnv:
    """Leave, which pays a sure ``bait``, or open two locks, for which two right verbs pay 1."""

    def __init__(self, bait: float) -> None:
        self._bait = bait

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        self._task, self._lock = options["task_id"], 0
        box = " and ".join(self._task.split("-"))
        return f"a {box} box with two locks .", self._info(valid=True)

    def step(self, action: str, /) -> tuple[str, float, bool, bool, dict[str, Any]]:
        offered = self._offered()
        valid = action in offered
        if valid and action == "leave":
            return "the end .", self._bait, True, False, self._info(valid, score=self._bait)
        right = action == CODE[self._lock]
        self._lock += right
        won = self._lock == len(CODE)
        text = "the end ." if won or not right else "one lock is open ."
        return text, float(won), won or not right, False, self._info(valid, won, float(won))

    def close(self) -> None: ...

    def _offered(self) -> tuple[str, ...]:
        return VERBS if self._lock else ("leave", *VERBS)

    def _info(self, valid: bool, won: bool = False, score: float = 0.0) -> dict[str, Any]:
        known = {"task_id": self._task, "goal": "take what pays .", "is_action_valid": valid}
        return known | {"admissible_actions": self._offered(), "won": won, "score": score}


class RandomPlayer:
    """One of the actions that are offered."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def act(self, observation: str, admissible: Sequence[str]) -> str:
        return self._random.choice(sorted(admissible))


class _Testbed(AgentDataModule):
    ids: Sequence[str]

    def tasks(self, split: str) -> list[Task]:
        of_split = zip(self.ids, cycle(SPLITS), strict=False)
        return [Task(name, split=split) for name, owner in of_split if owner == split]

    def vocabulary(self) -> list[str]:
        return [
            *VERBS,
            "leave",
            "walk to the end . take what pays .",
            "there is no sign . the sign says one lock is open . a and box with two locks",
            *COLOURS,
        ]


class CorridorDataModule(_Testbed):
    """The corridor; ``variant`` says whom the warm start imitates: `CorridorPlayer`."""

    ids = tuple(
        f"{a}-{x}-{b}-{y}"
        for (a, b), (x, y) in product(combinations(range(ROOMS), 2), product(VERBS, repeat=2))
    )

    def __init__(self, *, variant: Variant = "confident", **settings: Any) -> None:
        if variant not in ("confident", "uncertain"):
            raise ValueError(
                f"datamodule.variant={variant} is unknown: type confident or uncertain"
            )
        super().__init__(**settings)
        self.variant: Variant = variant

    def env_factory(self) -> Callable[[], TextEnv]:
        return CorridorEnv

    def make_expert(self, task: Task, seed: int) -> CorridorPlayer:
        return CorridorPlayer(self.variant, seed)


class BaitDataModule(_Testbed):
    """The bait, a sure reward of ``bait`` beside one of 1 that two right verbs earn."""

    ids = tuple(map("-".join, product(COLOURS, repeat=2)))

    def __init__(
        self, *, bait: float = 0.6, variant: Literal["uniform"] = "uniform", **settings: Any
    ) -> None:
        if variant != "uniform":
            raise ValueError(f"datamodule.variant={variant} is unknown: type uniform")
        if not 0 < bait < 1:
            raise ValueError(f"datamodule.bait={bait}: type a reward between 0 and 1, e.g. 0.6")
        super().__init__(**settings)
        self.bait = bait

    def env_factory(self) -> Callable[[], TextEnv]:
        return partial(BaitEnv, self.bait)

    def make_expert(self, task: Task, seed: int) -> RandomPlayer:
        return RandomPlayer(seed)
