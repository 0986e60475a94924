"""An expert that searches, since it does not know where things are, as a person would."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from aem_lightning.envs.alfworld.problem import TOOLS

SEEN_ON = re.compile(r"On the ([a-z]+ \d+), you see (.+?)\.")
SEEN_IN = re.compile(r"The ([a-z]+ \d+) is open\. In it, you see (.+?)\.")
ARRIVED = re.compile(r"You arrive at ([a-z]+ \d+)\.")
TAKEN = re.compile(r"You pick up the ([a-z]+ \d+) from the ([a-z]+ \d+)\.")
MOVED = re.compile(r"You move the ([a-z]+ \d+) to the ([a-z]+ \d+)\.")
TREATED = re.compile(r"You (clean|heat|cool) the ([a-z]+ \d+) using")
THING = re.compile(r"an? ([a-z]+ \d+)")

# Added to a random number in [0, 1): what is closed costs a turn more, few things lie in the bin.
RELUCTANCE = {"cabinet": 0.25, "drawer": 0.25, "safe": 0.25, "garbagecan": 0.5, "toilet": 0.5}

# Every word of its thoughts beside those of the game.
THOUGHTS = (
    "I look for the book. It is closed. I have not seen it yet.",
    "I do not need it. I need the lamp, which I saw at it.",
    "I hold it. I have to clean it with it first. I have to bring it to it.",
)


class SearchingExpert:
    """Plays from what it reads: observations, admissible actions, and what the goal is about.

    It visits the receptacles in an order of its own, opens what is closed, remembers what it saw,
    and does what the goal asks once it sees the target. It takes every turn's observation as news,
    so others may act in between. It never sends an action that is not admissible. ``thought`` says
    in one or two short sentences what it believes and wants, in the words that the game uses.

    Args:
        game_params: The goal: ``task_type``, ``object_target``, ``parent_target``,
            ``toggle_target`` (`Game.params`).
        seed: Seed of its search order.
    """

    def __init__(self, game_params: Mapping[str, Any], seed: int) -> None:
        self._target = str(game_params["object_target"]).lower()
        self._destination = str(game_params["parent_target"]).lower()
        self._lamp = str(game_params["toggle_target"]).lower()
        self._treatment, tool, _ = TOOLS.get(str(game_params["task_type"]), ("", "", ""))
        self._tool = tool.lower()
        self._rng = random.Random(seed)
        self._order: list[str] = []  # every receptacle, in the order of the search
        self._searched: set[str] = set()
        self._contents: dict[str, tuple[str, ...]] = {}  # as last seen
        self._place: str | None = None
        self._held: str | None = None
        self._treated: dict[str, set[str]] = {}
        self._chosen: str | None = None  # the receptacle of the destination's class that it fills
        self.thought = ""

    def act(self, observation: str, admissible: Sequence[str]) -> str:
        """The action that answers ``observation``, of those that are accepted now."""
        self._read(observation)
        allowed = frozenset(admissible)
        if not self._order:
            places = sorted(a.removeprefix("go to ") for a in admissible if a.startswith("go to "))
            self._order = sorted(
                places, key=lambda place: self._rng.random() + RELUCTANCE.get(_kind(place), 0.0)
            )
        action = self._with_full_hand(allowed) if self._held else self._with_empty_hand(allowed)
        return action if action in allowed else "look"

    def _read(self, observation: str) -> None:
        """Take in what the last turn changed and showed."""
        if found := ARRIVED.search(observation):
            self._place = found[1]
        if found := TAKEN.search(observation):
            self._held = found[1]
            self._change(found[2], without=found[1])
        if found := MOVED.search(observation):
            self._held = None
            self._change(found[2], with_=found[1])
        if found := TREATED.search(observation):
            done = self._treated.setdefault(found[2], set())
            done -= {"heat", "cool"} if found[1] != "clean" else set()
            done.add(found[1])
        for place, things in SEEN_ON.findall(observation) + SEEN_IN.findall(observation):
            self._contents[place] = tuple(THING.findall(things))
            self._searched.add(place)

    def _change(self, place: str, *, with_: str = "", without: str = "") -> None:
        kept = [thing for thing in self._contents.get(place, ()) if thing != without]
        self._contents[place] = (*kept, with_) if with_ else tuple(kept)

    def _with_empty_hand(self, allowed: frozenset[str]) -> str:
        """Take the target where it is known to be, else search on."""
        for place in sorted(self._contents, key=lambda place: place != self._place):
            for thing in self._contents[place]:
                if _kind(thing) == self._target and not self._is_delivered(thing, place):
                    self.thought = f"I need the {self._target}. I saw {thing} at {place}."
                    return self._at(place, f"take {thing} from {place}", allowed)
        return self._search(self._target, allowed)

    def _is_delivered(self, thing: str, place: str) -> bool:
        """Whether ``thing`` lies where the goal wants it (pick-two: both in one receptacle)."""
        if _kind(place) != self._destination:
            return False
        if self._treatment and self._treatment not in self._treated.get(thing, ()):
            return False
        if self._chosen is None:
            self._chosen = place
        return place == self._chosen

    def _with_full_hand(self, allowed: frozenset[str]) -> str:
        """Treat what is held if need be, then bring it where it belongs."""
        held = self._held or ""
        if _kind(held) != self._target:
            return self._put_down(held, allowed)
        if self._lamp:
            return self._look_under_lamp(allowed)
        if self._treatment and self._treatment not in self._treated.get(held, ()):
            tool = self._nearest(self._tool)
            self.thought = f"I hold {held}. I have to {self._treatment} it with {tool} first."
            return self._at(tool, f"{self._treatment} {held} with {tool}", allowed, inside=False)
        if self._chosen is None:
            self._chosen = self._nearest(self._destination)
        self.thought = f"I hold {held}. I have to bring it to {self._chosen}."
        return self._at(self._chosen, f"move {held} to {self._chosen}", allowed)

    def _look_under_lamp(self, allowed: frozenset[str]) -> str:
        for place, things in self._contents.items():
            for thing in things:
                if _kind(thing) == self._lamp:
                    self.thought = f"I hold {self._held}. I need {thing}, which I saw at {place}."
                    return self._at(place, f"use {thing}", allowed, inside=False)
        return self._search(self._lamp, allowed)

    def _put_down(self, held: str, allowed: frozenset[str]) -> str:
        """Get rid of what the goal does not need: here, or at the next place that takes it."""
        self.thought = f"I do not need {held}. I need the {self._target}."
        here = f"move {held} to {self._place}"
        if here in allowed:
            return here
        if f"open {self._place}" in allowed:
            return f"open {self._place}"
        return f"go to {self._order[self._rng.randrange(len(self._order))]}"

    def _search(self, kind: str, allowed: frozenset[str]) -> str:
        """Look for a thing of a class in the place at hand, else go to the next of the order."""
        if self._place and self._place not in self._searched and f"open {self._place}" in allowed:
            self.thought = f"I look for the {kind}. {self._place} is closed."
            return f"open {self._place}"
        left = [place for place in self._order if place not in self._searched]
        if not left:  # something was moved behind its back: start over
            self._searched.clear()
            left = self._order
        if not left:
            return "look"
        self.thought = f"I look for the {kind}. I have not seen {left[0]} yet."
        return f"go to {left[0]}"

    def _at(
        self, place: str | None, action: str, allowed: frozenset[str], *, inside: bool = True
    ) -> str:
        """``action`` if it can be done now, else what leads to it."""
        if action in allowed:
            return action
        if place is None:
            return "look"
        if self._place != place:
            return f"go to {place}"
        if inside and f"open {place}" in allowed:
            return f"open {place}"
        self._contents.pop(place, None)  # it is not as remembered
        return self._search(self._lamp if self._held else self._target, allowed)

    def _nearest(self, kind: str) -> str | None:
        """The first receptacle of a class, the one at hand before others."""
        places = [place for place in self._order if _kind(place) == kind]
        return self._place if self._place in places else next(iter(places), None)


def _kind(name: str) -> str:
    """The class in a name such as ``mug 2``."""
    return name.partition(" ")[0]
