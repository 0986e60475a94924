"""Software engineering: fix a repository until hidden tests pass."""

from aem_lightning.envs.swe.env import SweEnv
from aem_lightning.envs.swe.expert import BashExpert, FunctionsExpert, WordsExpert
from aem_lightning.envs.swe.grading import Grade, grade
from aem_lightning.envs.swe.instances import Instance, instances_hash, load_instances
from aem_lightning.envs.swe.settings import SweSettings, choose_sandbox

__all__ = [
    "BashExpert",
    "FunctionsExpert",
    "Grade",
    "Instance",
    "SweEnv",
    "SweSettings",
    "WordsExpert",
    "choose_sandbox",
    "grade",
    "instances_hash",
    "load_instances",
]
