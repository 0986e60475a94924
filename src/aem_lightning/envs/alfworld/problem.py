"""One generated game: what is where, what is asked for, how to win, and the files that say so."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from aem_lightning.envs.alfworld.package import Kit
from aem_lightning.envs.alfworld.scenes import Difficulty, Receptacle, Scene, keyed_random, new_id

TASK_TYPES = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)
TOOLS = {
    "pick_clean_then_place_in_recep": ("clean", "SinkBasin", "Cleanable"),
    "pick_heat_then_place_in_recep": ("heat", "Microwave", "Heatable"),
    "pick_cool_then_place_in_recep": ("cool", "Fridge", "Coolable"),
}
LAMPS = ("DeskLamp", "FloorLamp")
LAMP_TABLES = frozenset({"SideTable", "Desk", "Dresser", "CoffeeTable", "Shelf", "DiningTable"})
ROOM_FOR_ONE = frozenset({"ToiletPaperHanger", "TowelHolder", "HandTowelHolder", "CoffeeMachine"})


@dataclass(frozen=True)
class Item:
    """A portable object (or a lamp): its class, its PDDL id, and where it starts."""

    kind: str
    id: str
    at: Receptacle


@dataclass(frozen=True)
class GamePlan:
    """A game before it is written.

    Attributes:
        task_type: One of `TASK_TYPES`.
        scene: The room.
        target: Class of the object that the goal is about.
        destination: Class of the receptacle that it must reach; empty for the look tasks.
        lamp: Class of the lamp to look under; empty for the others.
        sentence: The goal in words.
        items: Everything that lies around, the targets first.
        targets: How many of ``items`` the goal needs.
        difficulty: What it was planned for.
        seed: The seed and the derivation path that made it.
    """

    task_type: str
    scene: Scene
    target: str
    destination: str
    lamp: str
    sentence: str
    items: tuple[Item, ...]
    targets: int
    difficulty: Difficulty
    seed: tuple[int | str, ...]

    @property
    def folder(self) -> str:
        place = self.destination or self.lamp
        return f"{self.task_type}-{self.target}-None-{place}-{self.scene.number}"

    @property
    def trial(self) -> str:
        key = repr((self.seed, self.task_type, self.scene.number, asdict(self.difficulty)))
        digest = hashlib.sha256(key.encode()).digest()
        return f"trial_G{int.from_bytes(digest[:5], 'big'):013d}"

    @property
    def start_state(self) -> tuple[object, ...]:
        """What tells games apart, except the wording of the goal and the numbers of objects."""
        things = Counter((item.kind, item.at.id) for item in self.items)
        goal = (self.task_type, self.target, self.destination, self.lamp)
        return (*goal, self.scene.number, tuple(sorted(things.items())))


def plan_game(
    kit: Kit, task_type: str, scene: Scene, difficulty: Difficulty, seed: tuple[int | str, ...]
) -> GamePlan | None:
    """A game in ``scene``, a function of the seed; None where the scene cannot serve the task."""
    rng = keyed_random("game", seed)
    goals = sorted(_possible_goals(kit, task_type, scene))
    if not goals:
        return None
    target, destination = rng.choice(goals)
    lamp = rng.choice(LAMPS) if task_type == "look_at_obj_in_light" else ""
    targets = 2 if task_type == "pick_two_obj_and_place" else 1
    sentence = rng.choice(kit.goals[task_type]["templates"]).format(
        obj=target.lower(), recep=destination.lower(), toggle=lamp.lower(), mrecep=""
    )
    goal = (target, destination, lamp)
    items = _place_items(kit, scene, difficulty, rng, goal, targets)
    return GamePlan(task_type, scene, *goal, sentence, tuple(items), targets, difficulty, seed)


def _possible_goals(kit: Kit, task_type: str, scene: Scene) -> Iterator[tuple[str, str]]:
    """Every (target, destination) that the scene can serve; look tasks have no destination."""
    is_look = task_type == "look_at_obj_in_light"
    _, tool, needed = TOOLS.get(task_type, ("", "", ""))
    for destination in {""} if is_look else scene.kinds - {tool}:
        if task_type == "pick_two_obj_and_place" and destination in ROOM_FOR_ONE:
            continue
        for target in kit.portable:
            fits = is_look or target in kit.holds.get(destination, ())
            serves = not needed or target in kit.properties[needed]
            starts = any(target in kit.holds.get(kind, ()) for kind in scene.kinds - {destination})
            if fits and serves and starts:
                yield target, destination


def _place_items(
    kit: Kit,
    scene: Scene,
    difficulty: Difficulty,
    rng: random.Random,
    goal: tuple[str, str, str],
    targets: int,
) -> list[Item]:
    target, destination, lamp = goal
    used: set[str] = set()

    def holders(kind: str, avoid: str = "") -> list[Receptacle]:
        fits = (r for r in scene.receptacles if kind in kit.holds.get(r.kind, ()))
        return [r for r in fits if r.kind != avoid]

    items = []
    for _ in range(targets):
        is_hidden = rng.random() < difficulty.hidden
        places = holders(target, avoid=destination)
        preferred = [r for r in places if (r.kind in kit.openable) == is_hidden]
        at = rng.choice(preferred or places)
        items.append(Item(target, new_id(target, rng, used), at))
    if lamp:
        tables = [r for r in scene.receptacles if r.kind in LAMP_TABLES]
        items.append(Item(lamp, new_id(lamp, rng, used), rng.choice(tables)))
    others = [kind for kind in kit.portable if kind != target and holders(kind)]
    while len(items) < difficulty.objects:
        kind = rng.choice(others)
        items.append(Item(kind, new_id(kind, rng, used), rng.choice(holders(kind))))
    return items


def game_files(kit: Kit, plan: GamePlan) -> dict[str, str]:
    """The files of a game's folder, by name."""
    problem = _problem(kit, plan)
    game = {
        "pddl_domain": kit.domain,
        "grammar": kit.grammar.replace("UNKNOWN GOAL", plan.sentence),
        "pddl_problem": problem,
        "solvable": True,
        "walkthrough": walkthrough(kit, plan),
    }
    return {
        "initial_state.pddl": problem,
        "traj_data.json": json.dumps(_trajectory_data(plan), indent=1),
        "game.tw-pddl": json.dumps(game),
    }


def _trajectory_data(plan: GamePlan) -> dict[str, Any]:
    return {
        "task_id": plan.trial,
        "task_type": plan.task_type,
        "pddl_params": {
            "object_target": plan.target,
            "parent_target": plan.destination,
            "mrecep_target": "",
            "toggle_target": plan.lamp,
            "object_sliced": False,
        },
        "scene": {"floor_plan": f"FloorPlan{plan.scene.number}", "scene_num": plan.scene.number},
        "turk_annotations": {
            "anns": [{"task_desc": plan.sentence, "high_descs": [], "votes": [1]}]
        },
        "plan": {"high_pddl": [], "low_actions": []},
        "images": [],
        "generator": {"room": plan.scene.room, "seed": list(plan.seed), **asdict(plan.difficulty)},
    }


def _problem(kit: Kit, plan: GamePlan) -> str:
    """The start state and the goal in PDDL."""
    goal = kit.goals[plan.task_type]["pddl"].format(
        obj=plan.target, recep=plan.destination, toggle=plan.lamp
    )
    indent = "\n        "
    return (
        f"\n(define (problem plan_{plan.trial})\n(:domain alfred)"
        f"\n(:objects{indent}{indent.join(_declarations(kit, plan))}{indent})"
        f"\n(:init{indent}{indent.join(_facts(kit, plan))}{indent})"
        f"\n{goal.replace('#', '-')}\n"
    )


def _declarations(kit: Kit, plan: GamePlan) -> Iterator[str]:
    """Every constant with its type: with a class undeclared, the goal is silently out of reach."""
    objects = sorted(set(kit.objects) - set(kit.receptacles))
    yield "agent1 - agent"
    if plan.difficulty.padded:
        yield from (f"{kind} - object" for kind in objects)
    yield from (f"{kind}Type - otype" for kind in objects)
    yield from (f"{kind}Type - rtype" for kind in kit.receptacles)
    yield from (f"{item.id} - object" for item in plan.items)
    for receptacle in plan.scene.receptacles:
        yield f"{receptacle.id} - receptacle"
        yield f"{receptacle.location} - location"
    yield f"{plan.scene.start} - location"


def _facts(kit: Kit, plan: GamePlan) -> Iterator[str]:
    """Everything that is true at the start."""
    yield f"(atLocation agent1 {plan.scene.start})"
    for receptacle in plan.scene.receptacles:
        yield f"(receptacleType {receptacle.id} {receptacle.kind}Type)"
        yield f"(receptacleAtLocation {receptacle.id} {receptacle.location})"
        if receptacle.kind in kit.openable:
            yield f"(openable {receptacle.id})"
    present = {item.kind for item in plan.items}
    for kind in sorted(plan.scene.kinds):
        for fitting in sorted(present & kit.holds.get(kind, frozenset())):
            yield f"(canContain {kind}Type {fitting}Type)"
    for item in plan.items:
        yield f"(objectType {item.id} {item.kind}Type)"
        yield f"(inReceptacle {item.id} {item.at.id})"
        yield f"(objectAtLocation {item.id} {item.at.location})"
        if item.kind in kit.portable:
            yield f"(pickupable {item.id})"
        if item.kind in kit.movable:
            yield f"(isReceptacleObject {item.id})"
        for name in sorted(kit.properties):
            if item.kind in kit.properties[name]:
                yield f"({name.lower()} {item.id})"


def walkthrough(kit: Kit, plan: GamePlan) -> list[str]:
    """Actions that win, written with knowledge of where everything is."""
    names = engine_names(plan)
    actions: list[str] = []
    opened: set[str] = set()
    here = ""

    def go(place: Receptacle, *, inside: bool) -> None:
        nonlocal here
        if here != place.id:
            actions.append(f"go to {names[place.id]}")
            here = place.id
        if inside and place.kind in kit.openable and place.id not in opened:
            actions.append(f"open {names[place.id]}")
            opened.add(place.id)

    for item in plan.items[: plan.targets]:
        go(item.at, inside=True)
        actions.append(f"take {names[item.id]} from {names[item.at.id]}")
        if plan.lamp:
            lamp = next(other for other in plan.items if other.kind == plan.lamp)
            go(lamp.at, inside=False)
            actions.append(f"use {names[lamp.id]}")
            break
        if plan.task_type in TOOLS:
            verb, kind, _ = TOOLS[plan.task_type]
            tool = next(r for r in plan.scene.receptacles if r.kind == kind)
            go(tool, inside=False)
            actions.append(f"{verb} {names[item.id]} with {names[tool.id]}")
        end = next(r for r in plan.scene.receptacles if r.kind == plan.destination)
        go(end, inside=True)
        actions.append(f"move {names[item.id]} to {names[end.id]}")
    return actions


def engine_names(plan: GamePlan) -> dict[str, str]:
    """What the engine calls each thing: class and number, counted down along the sorted ids."""
    things: list[Item | Receptacle] = [*plan.items, *plan.scene.receptacles]
    left = Counter(thing.kind for thing in things)
    names = {}
    for thing in sorted(things, key=lambda thing: thing.id.lower()):
        names[thing.id] = f"{thing.kind.lower()} {left[thing.kind]}"
        left[thing.kind] -= 1
    return names
