"""Texts with every word that the ALFWorld engine can say, for building a tokenizer."""

from __future__ import annotations

import re

from aem_lightning.envs.alfworld.package import load_kit
from aem_lightning.envs.alfworld.problem import TASK_TYPES

NUMBERS = 40
# Commands as the engine's grammar writes them; the names come from the classes.
COMMANDS = (
    *("go to a 1", "open a 1", "close a 1", "take a 1 from a 2", "move a 1 to a 2", "use a 1"),
    *("heat a 1 with a 2", "clean a 1 with a 2", "cool a 1 with a 2", "slice a 1 with a 2"),
    *("examine a 1", "inventory", "look", "help"),
)
REPLY = re.compile(r'"rhs"\s*:\s*"((?:[^"\\]|\\.)*)"')
# Code between braces and brackets; what it inserts are names, with "a" in front.
CODE = re.compile(r"\{[^{}]*\}|#[^#]*#|[\[\]]")


def vocabulary_texts() -> list[str]:
    """Texts that hold every word of observations, goals and actions at least once.

    Human annotations of official games are free text, so they are not covered.

    Raises:
        MissingExtraError: alfworld is not installed.
    """
    kit = load_kit()
    names = sorted({name.lower() for name in (*kit.objects, *kit.receptacles)})
    texts = [f"a {name} 1, and a {name} 2." for name in names]
    texts.append(", ".join(str(number) for number in range(1, NUMBERS + 1)))
    for task_type in TASK_TYPES:
        for template in kit.goals[task_type]["templates"]:
            goal = template.format(obj="apple", recep="fridge", toggle="desklamp", mrecep="")
            texts.append(f"a.\n\nYour task is to: {goal}.")
    for reply in REPLY.findall(kit.grammar.replace('\\"', "'")):
        texts.append(CODE.sub(" a ", reply.replace("\\n", "\n").replace("UNKNOWN GOAL", "")))
    texts.append("Nothing happens.")
    texts.append("You see nothing, and a nothing.")
    texts.extend(COMMANDS)
    return [text for text in texts if text.strip()]
