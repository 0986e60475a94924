"""Rooms for generated games: what stands where, as a function of the scene's number alone."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

SCENES_PER_ROOM = 30


@dataclass(frozen=True)
class Difficulty:
    """How much there is to search.

    Attributes:
        receptacles: Receptacles in the room; at least those that its type always has.
        objects: Portable objects, the target among them.
        hidden: Chance that a target starts in a closed receptacle, where one can hold it.
        padded: Declare the classes without instances too, as official problems do (slower to load).
    """

    receptacles: int
    objects: int
    hidden: float
    padded: bool = False


DIFFICULTIES = {
    "easy": Difficulty(6, 5, 0.0),
    "medium": Difficulty(10, 12, 0.5),
    "hard": Difficulty(24, 40, 0.9, padded=True),
}


@dataclass(frozen=True)
class Room:
    """A room type: the official number of its first scene, what it always has, what it may have."""

    first_scene: int
    always: tuple[str, ...]
    often: tuple[str, ...]


# A class that is named twice among `often` is drawn twice as often.
ROOMS = {
    "Kitchen": Room(
        1,
        ("Fridge", "Microwave", "SinkBasin", "CounterTop", "GarbageCan"),
        (
            *("Cabinet", "Cabinet", "Drawer", "Drawer", "StoveBurner", "StoveBurner"),
            *("CounterTop", "Shelf", "DiningTable", "SideTable", "CoffeeMachine", "Toaster"),
        ),
    ),
    "LivingRoom": Room(
        201,
        ("Sofa", "CoffeeTable", "SideTable", "GarbageCan"),
        ("Drawer", "Shelf", "ArmChair", "TVStand", "Dresser", "DiningTable", "Cabinet", "Safe"),
    ),
    "Bedroom": Room(
        301,
        ("Bed", "Desk", "SideTable", "GarbageCan"),
        ("Drawer", "Drawer", "Shelf", "Dresser", "ArmChair", "Safe", "LaundryHamper", "Cabinet"),
    ),
    "Bathroom": Room(
        401,
        ("SinkBasin", "CounterTop", "Toilet", "GarbageCan", "ToiletPaperHanger"),
        (
            *("Cabinet", "Drawer", "Shelf", "TowelHolder", "HandTowelHolder", "BathtubBasin"),
            "SideTable",
        ),
    ),
}


@dataclass(frozen=True)
class Receptacle:
    """A fixed receptacle: its class, its PDDL id and the PDDL id of the place in front of it."""

    kind: str
    id: str
    location: str


@dataclass(frozen=True)
class Scene:
    """A room with its receptacles, and the place where the agent starts: no receptacle is there."""

    room: str
    number: int
    receptacles: tuple[Receptacle, ...]
    start: str

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(receptacle.kind for receptacle in self.receptacles)


def keyed_random(*key: object) -> random.Random:
    """A generator that depends on ``key`` alone: the same in every process, on every machine."""
    return random.Random(hashlib.sha256(repr(key).encode()).digest())


def build_scene(room: str, index: int, size: int) -> Scene:
    """Scene ``index`` (0 to 29) of a room type, with ``size`` receptacles or more."""
    number = ROOMS[room].first_scene + index
    rng = keyed_random("scene", number, size)
    kinds = list(ROOMS[room].always)
    while len(kinds) < size:
        kinds.append(rng.choice(ROOMS[room].often))
    spots = rng.sample([(x, z) for x in range(-12, 13) for z in range(-12, 13)], len(kinds) + 1)
    places = [
        mangle(f"loc|{x}|{z}|{rng.randrange(4)}|{rng.choice((-15, 0, 30, 45, 60))}")
        for x, z in spots
    ]
    used: set[str] = set()
    receptacles = [
        Receptacle(kind, new_id(kind, rng, used), place)
        for kind, place in zip(kinds, places[1:], strict=True)
    ]
    return Scene(room, number, tuple(receptacles), places[0])


def new_id(kind: str, rng: random.Random, used: set[str]) -> str:
    """An unused PDDL id in the simulator's form, e.g. ``Mug|+00.25|-01.30|+02.00``, mangled."""
    while True:
        position = "".join(f"|{rng.uniform(-3, 3):+06.2f}" for _ in range(3))
        # A basin is part of a sink or a bathtub; the engine names it by the ending.
        name = f"{kind[:-5]}{position}|{kind}" if kind.endswith("Basin") else kind + position
        if name not in used:
            used.add(name)
            return mangle(name)


def mangle(name: str) -> str:
    """``name`` with PDDL's forbidden characters spelled out, as the engine expects them."""
    spelled = {"-": "_minus_", "|": "_bar_", "+": "_plus_", ".": "_dot_", ",": "_comma_"}
    return "".join(spelled.get(character, character) for character in name)
