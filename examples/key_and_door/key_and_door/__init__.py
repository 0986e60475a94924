"""A text game of eight rooms, a lamp, a key and a door, all in one file."""

from itertools import permutations

from aem_lightning.datamodules import AgentDataModule
from aem_lightning.types import Task

ROOMS = ("attic", "cellar", "garden", "kitchen", "library", "pantry", "stable", "tower")
DEEDS = ("take the lamp", "take the key", "open the door")  # in this order
ACTIONS = (*(f"go to the {room}" for room in ROOMS), *DEEDS)
RULES = "the lamp is in the {} , the key is in the {} , the door is in the {}"
HELD = ("nothing", "the lamp", "the lamp and the key", "the open door")
SPLITS = ("train", "train", "train", "valid_seen", "valid_unseen")  # of every five games


class KeyEnv:
    """One episode at a time; the task id names the rooms of lamp, key and door."""

    def reset(self, *, seed=None, options=None):
        self.task_id, self.room, self.done = options["task_id"], "hall", 0
        self.places = self.task_id.split("-")
        return f"{RULES.format(*self.places)} . {self.look()}", self.info(True)

    def step(self, action, /):
        if action in ACTIONS and action.startswith("go"):
            self.room = action.split()[-1]
        self.done += (action, self.room) == (DEEDS[self.done], self.places[self.done])
        won = self.done == len(DEEDS)
        return self.look(), float(won), won, False, self.info(action in ACTIONS, won)

    def close(self): ...

    def look(self):
        return f"you are in the {self.room} with {HELD[self.done]} ."

    def info(self, valid, won=False):
        known = {"task_id": self.task_id, "goal": RULES.format(*self.places)}
        return known | {"admissible_actions": ACTIONS, "is_action_valid": valid, "won": won}


class KeyExpert:
    """What the tiny policy learns from first; a policy that reads needs none."""

    def __init__(self, task):
        self.places = task.id.split("-")

    def act(self, observation, admissible):
        done = next(i for i, held in enumerate(HELD) if f"with {held} ." in observation)
        there = f"in the {self.places[done]} with" in observation
        return DEEDS[done] if there else f"go to the {self.places[done]}"


class KeyDataModule(AgentDataModule):
    """Which tasks there are, and how one environment is made."""

    def tasks(self, split):
        games = ["-".join(rooms) for rooms in permutations(ROOMS, 3)]
        return [Task(game, split=split) for i, game in enumerate(games) if SPLITS[i % 5] == split]

    def env_factory(self):
        return KeyEnv

    def make_expert(self, task, seed):
        return KeyExpert(task)

    def vocabulary(self):
        return [*ACTIONS, RULES, *ROOMS, *HELD, "you are in the hall with . ,"]
