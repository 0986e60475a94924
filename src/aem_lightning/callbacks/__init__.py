"""Callbacks: they read what a step returns and write curves, tables, transcripts and adapters.

They observe only, but for the two curricula, which choose what is played. None of the others
changes weights, the iteration or a random state, so a run with all of them removed ends with the
same bits. The x axis is iterations: Lightning's ``global_step`` counts updates, of which one
iteration makes several.
"""

from aem_lightning.callbacks.adapter_export import AdapterExport
from aem_lightning.callbacks.aem import AEMMonitor
from aem_lightning.callbacks.collapse import TemplateCollapse
from aem_lightning.callbacks.curriculum import HorizonGrowth, TaskWeights
from aem_lightning.callbacks.hyperparameters import Hyperparameters
from aem_lightning.callbacks.learning import LearningWatch
from aem_lightning.callbacks.overview import Overview
from aem_lightning.callbacks.profile import Profile
from aem_lightning.callbacks.progress import Meter, Progress
from aem_lightning.callbacks.step_time import StepTime
from aem_lightning.callbacks.transcripts import Transcripts
from aem_lightning.callbacks.trends import TrendWatch

__all__ = [
    "AEMMonitor",
    "AdapterExport",
    "HorizonGrowth",
    "Hyperparameters",
    "LearningWatch",
    "Meter",
    "Overview",
    "Profile",
    "Progress",
    "StepTime",
    "TaskWeights",
    "TemplateCollapse",
    "Transcripts",
    "TrendWatch",
]
