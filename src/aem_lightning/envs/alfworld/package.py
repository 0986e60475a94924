"""The optional packages behind ALFWorld, imported on use and without side effects.

``alfworld.info`` creates a folder in the user's cache and sets ``ALFWORLD_DATA``; the functions
here point it at an existing folder while it is imported and put the variable back.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from aem_lightning.envs.base import MissingExtraError


@dataclass(frozen=True)
class Kit:
    """What the installed package says: what fits where, what can be done, how goals read.

    Attributes:
        objects: Every class name, e.g. ``AlarmClock``.
        receptacles: The classes that stand fixed in a room, e.g. ``CounterTop``.
        holds: The object classes that each receptacle class can hold.
        portable: The object classes that can be taken, sorted.
        movable: The object classes that are receptacles themselves, e.g. ``Bowl``.
        openable: The receptacle classes with a door or a lid.
        properties: The object classes that can be heated, cooled, cleaned, toggled, sliced.
        rooms: The room types that each task type is played in.
        goals: For each task type its goal in PDDL and the templates of its sentence.
        domain: The PDDL domain.
        grammar: The text grammar, with ``UNKNOWN GOAL`` in place of the goal's sentence.
    """

    objects: tuple[str, ...]
    receptacles: tuple[str, ...]
    holds: Mapping[str, frozenset[str]]
    portable: tuple[str, ...]
    movable: frozenset[str]
    openable: frozenset[str]
    properties: Mapping[str, frozenset[str]]
    rooms: Mapping[str, tuple[str, ...]]
    goals: Mapping[str, Mapping[str, Any]]
    domain: str
    grammar: str


@cache
def load_kit() -> Kit:
    """The tables of the installed ``alfworld``.

    Raises:
        MissingExtraError: It is not installed.
    """
    constants = import_optional("alfworld.gen.constants")
    goals = import_optional("alfworld.gen.goal_library")
    data = Path(str(import_optional("alfworld").__file__)).parent / "data"
    holds = {
        receptacle: frozenset(name for name in objects if not name.endswith("Sliced"))
        for receptacle, objects in constants.VAL_RECEPTACLE_OBJECTS.items()
    }
    movable = frozenset(constants.MOVABLE_RECEPTACLES_SET)
    portable = frozenset().union(*holds.values()) - {"DeskLamp", "FloorLamp"}
    return Kit(
        objects=tuple(sorted(constants.OBJECTS)),
        receptacles=tuple(sorted(set(constants.RECEPTACLES) - movable)),
        holds=holds,
        portable=tuple(sorted(portable)),
        movable=movable,
        openable=frozenset(constants.OPENABLE_CLASS_LIST),
        properties={k: frozenset(v) for k, v in constants.VAL_ACTION_OBJECTS.items()},
        rooms={k: tuple(sorted(v)) for k, v in constants.GOALS_VALID.items()},
        goals=goals.gdict,
        domain=(data / "alfred.pddl").read_text(encoding="utf-8"),
        grammar=(data / "alfred.twl2").read_text(encoding="utf-8"),
    )


def import_optional(name: str) -> Any:
    """The module ``name`` of alfworld, textworld or a package that they bring.

    Raises:
        MissingExtraError: It is not installed.
    """
    before = os.environ.get("ALFWORLD_DATA")
    os.environ["ALFWORLD_DATA"] = tempfile.gettempdir()
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingExtraError(name.partition(".")[0], "alfworld") from error
    finally:
        del os.environ["ALFWORLD_DATA"]
        if before is not None:
            os.environ["ALFWORLD_DATA"] = before
